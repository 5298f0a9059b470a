"""Global batches, made ahead of the step that needs them: the same on any number of ranks, each of which makes its share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from openglm.data.mixture import Mixture, Sample
from openglm.errors import ConfigError
from openglm.infilling import NO_TARGET, Batch


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a global batch, in rows of one length."""

    batch: Batch
    samples: list[Sample]
    owners: np.ndarray
    """int64 ``[rows, length]``: index into ``samples`` of each place, -1 = padding."""


@dataclass(frozen=True)
class GlobalBatch:
    """One data rank's share of samples [first, first + size) of a run."""

    first: int
    size: int
    """Samples of all ranks."""
    micro_batches: list[MicroBatch]
    tokens: int
    """Tokens of the share, without padding."""
    targets: int
    """Tokens of the share that carry loss."""


@dataclass(frozen=True)
class Rows:
    """How samples become rows."""

    micro_tokens: int
    """Places of one micro-batch, padding included."""
    aggregate: int = 0
    """Put samples side by side in rows of this many places; 0 = one sample a row, as long as the longest beside it."""
    pad: int = 0


def share_of(first: int, size: int, rank: int, ranks: int) -> range:
    """Numbers of the samples that one of ``ranks`` data ranks takes; together they are first .. first + size."""
    return range(first + -(-size * rank // ranks), first + -(-size * (rank + 1) // ranks))


def make_batch(mixture: Mixture, first: int, size: int, rows: Rows, rank: int = 0, ranks: int = 1) -> GlobalBatch:
    """Lay out a rank's share of ``size`` samples; a micro-batch holds at most ``micro_tokens`` places (or one row).

    Samples are sorted by length first, so that little is spent on padding; aggregated ones go longest first into the
    first row with room.
    """
    samples = [mixture.sample(number) for number in share_of(first, size, rank, ranks)]
    samples.sort(key=lambda sample: len(sample.layout))
    make = _aggregated if rows.aggregate else _side_by_side
    tokens = sum(len(sample.layout) for sample in samples)
    targets = sum(int((s.layout.targets != NO_TARGET).sum()) for s in samples if s.layout.targets is not None)
    return GlobalBatch(first, size, list(make(samples, rows)), tokens, targets)


def empty_micro_batch(like: Rows, window: int) -> MicroBatch:
    """A micro-batch without samples, for a rank that has fewer than the others: collectives need equally many."""
    if like.aggregate:
        return _micro([[] for _ in range(_rows_each(like))], [], like.aggregate, like.pad)
    return _micro([[]], [], min(window, 8), like.pad)


def _side_by_side(samples: list[Sample], rows: Rows) -> Iterator[MicroBatch]:
    groups: list[list[Sample]] = [[]]
    for sample in samples:
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.layout) > rows.micro_tokens:
            groups.append([])
        groups[-1].append(sample)
    for group in groups:
        if group:
            batch = Batch.stack([s.layout for s in group], pad=rows.pad, multiple=8)
            owners = np.where(batch.valid.numpy(), np.arange(len(group))[:, None], -1)
            yield MicroBatch(batch, group, owners)


def _rows_each(rows: Rows) -> int:
    return max(rows.micro_tokens // rows.aggregate, 1)


def _aggregated(samples: list[Sample], rows: Rows) -> Iterator[MicroBatch]:
    """Micro-batches of one shape."""
    length = rows.aggregate
    packed: list[list[Sample]] = []
    room: list[int] = []
    for sample in reversed(samples):
        size = len(sample.layout)
        if size > length:
            raise ConfigError(f"a sample of {size} tokens does not fit rows of {length}", key="objectives.long_window")
        found = next((row for row, free in enumerate(room) if free >= size), None)
        if found is None:
            packed.append([])
            room.append(length)
            found = len(packed) - 1
        packed[found].append(sample)
        room[found] -= size
    each = _rows_each(rows)
    for start in range(0, len(packed), each):
        group = packed[start : start + each]
        group += [[] for _ in range(each - len(group))]
        yield _micro(group, [sample for row in group for sample in row], length, rows.pad)


def _micro(rows: list[list[Sample]], samples: list[Sample], length: int, pad: int) -> MicroBatch:
    batch = Batch.aggregate([[sample.layout for sample in row] for row in rows], length, pad=pad)
    owners = np.full((len(rows), length), -1)
    number = 0
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            owners[index, start : start + len(sample.layout)] = number
            start += len(sample.layout)
            number += 1
    return MicroBatch(batch, samples, owners)


class Loader:
    """Makes the next global batch while the last one is used. Its whole state is the number of the next sample."""

    def __init__(self, mixture: Mixture, rows: Rows, rank: int = 0, ranks: int = 1) -> None:
        self._make = lambda first, size: make_batch(mixture, first, size, rows, rank, ranks)
        self._pool = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int], object] = {}

    def batch(self, first: int, size: int, then: tuple[int, int] | None = None) -> GlobalBatch:
        """Samples first .. first + size; ``then``: (first, size) of the batch that will probably be asked for next."""
        pending = self._ahead.pop((first, size), None) or self._pool.submit(self._make, first, size)
        self._ahead.clear()  # after a jump, what was made ahead is of no use
        if then is not None and then[1] > 0:
            self._ahead[then] = self._pool.submit(self._make, *then)
        return pending.result()  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)
