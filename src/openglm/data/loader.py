"""Global batches as micro-batches of similar lengths, made ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from openglm.data.mixture import Mixture, Sample
from openglm.infilling import NO_TARGET, Batch


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a global batch, padded to their longest."""

    batch: Batch
    samples: list[Sample]


@dataclass(frozen=True)
class GlobalBatch:
    """Samples [first, first + size) of a run."""

    first: int
    micro_batches: list[MicroBatch]
    tokens: int
    """Tokens without padding."""
    targets: int
    """Tokens that carry loss: the denominator of the mean loss."""


def make_batch(mixture: Mixture, first: int, size: int, micro_tokens: int, pad: int = 0) -> GlobalBatch:
    """Lay out samples ``first`` .. ``first + size``; a micro-batch holds at most ``micro_tokens`` places (or one sample).

    Samples are sorted by length first, so that little is spent on padding.
    """
    samples = sorted((mixture.sample(first + k) for k in range(size)), key=lambda sample: len(sample.layout))
    groups: list[list[Sample]] = [[]]
    for sample in samples:
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.layout) > micro_tokens:
            groups.append([])
        groups[-1].append(sample)
    micro = [MicroBatch(Batch.stack([s.layout for s in group], pad=pad, multiple=8), group) for group in groups]
    tokens = sum(len(sample.layout) for sample in samples)
    targets = sum(int((s.layout.targets != NO_TARGET).sum()) for s in samples if s.layout.targets is not None)
    return GlobalBatch(first, micro, tokens, targets)


def batches(mixture: Mixture, first: int, sizes: Iterator[int], micro_tokens: int) -> Iterator[GlobalBatch]:
    """Global batches from sample ``first`` on, the next one made while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        size = next(sizes, None)
        pending = pool.submit(make_batch, mixture, first, size, micro_tokens) if size else None
        while pending is not None and size:
            first += size
            current = pending
            size = next(sizes, None)
            pending = pool.submit(make_batch, mixture, first, size, micro_tokens) if size else None
            yield current.result()
