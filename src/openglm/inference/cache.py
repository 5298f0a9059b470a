"""The key/value cache: one pool of columns, allocated once, of which every sequence holds some (SPEC 5.2).

A column is one token's key and value in all layers and heads. A sequence has its prompt in one run of columns, which several
sequences may share, and its answer in another; so beams and samples keep the prompt once, and sequences of any length lie
side by side without padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openglm.config import ModelConfig


@dataclass(frozen=True)
class Run:
    """Columns that lie one behind the other."""

    start: int
    count: int


@dataclass
class Place:
    """Where a sequence lies: columns 0 to ``shared`` in its prompt's run, the others in its own, from the run's beginning."""

    prompt: Run
    own: Run
    shared: int
    length: int
    """Columns in use."""

    def columns(self, first: int, end: int) -> np.ndarray:
        """int64: where the sequence's columns ``first`` to ``end`` lie in the pool."""
        at = np.arange(first, end)
        return np.where(at < self.shared, self.prompt.start + at, self.own.start + at - self.shared)

    @property
    def straight(self) -> bool:
        """True if the two runs are one."""
        return self.own.start == self.prompt.start + self.shared


class ColumnPool:
    """Rotated keys and values, ``[layers, heads, columns, head size]`` each.

    dtype int8 stores codes with a float32 scale for each column and head, in a quarter of the memory of float32. ``layers``,
    ``heads``: all of the model's, or some.
    """

    def __init__(
        self,
        config: ModelConfig,
        columns: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: int | None = None,
        heads: int | None = None,
    ) -> None:
        heads = config.num_attention_heads if heads is None else heads
        layers = config.num_layers if layers is None else layers
        shape = (layers, heads, columns, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scales: Tensor | None = None
        """float32 ``[2, layers, heads, columns]`` of keys and values, for int8."""
        if dtype == torch.int8:
            self.scales = torch.zeros((2, layers, heads, columns), device=device)
        self.columns = columns
        self._free = [Run(0, columns)]

    @property
    def free(self) -> int:
        """Columns that nobody holds."""
        return sum(run.count for run in self._free)

    def clear(self) -> None:
        """Nobody holds a column any more."""
        self._free = [Run(0, self.columns)]

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether runs of so many columns could all be taken now."""
        taken = []
        try:
            for count in counts:
                taken.append(self.take(count))
        except MemoryError:
            return False
        finally:
            for run in taken:
                self.give_back(run)
        return True

    def take(self, count: int) -> Run:
        """So many columns side by side. Raises ``MemoryError`` where there are none."""
        for index, run in enumerate(self._free):
            if run.count >= count:
                rest = Run(run.start + count, run.count - count)
                self._free[index : index + 1] = [rest] if rest.count else []
                return Run(run.start, count)
        raise MemoryError(f"no {count} columns of the cache are free side by side")

    def give_back(self, run: Run) -> None:
        """These columns may be taken again."""
        if not run.count:
            return
        merged: list[Run] = []
        for part in sorted([*self._free, run], key=lambda part: part.start):
            if merged and merged[-1].start + merged[-1].count == part.start:
                merged[-1] = Run(merged[-1].start, merged[-1].count + part.count)
            else:
                merged.append(part)
        self._free = merged

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Columns ``target`` become what columns ``source`` are, in all layers."""
        if len(source):
            read, write = (torch.from_numpy(index).to(self.keys.device) for index in (source, target))
            for buffer in (self.keys, self.values):
                buffer[:, :, write] = buffer[:, :, read]
            if self.scales is not None:
                self.scales[..., write] = self.scales[..., read]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of vectors ``[..., d]``, and their scales float32 ``[...]``: the largest number becomes 127."""
    scales = x.abs().amax(-1).float() / 127
    steps = torch.where(scales == 0, 1, scales)
    return (x.float() / steps.unsqueeze(-1)).round().to(torch.int8), scales


class PoolView:
    """What attention needs of the pool in one pass: where each token of a batch goes, and what it finds there.

    ``places``: one for each sequence, as they are before the pass. ``counts``: tokens of each; the pass is as wide as the
    longest, and what lies beyond a sequence's own is padding, on the right, or on the left where ``left``.
    """

    def __init__(self, pool: ColumnPool, places: Sequence[Place], counts: Sequence[int], *, left: bool = False) -> None:
        self._pool = pool
        device, width = pool.keys.device, max(counts)
        self.first = all(place.length == 0 for place in places)
        """Nothing was there: attention needs no look into the pool."""
        starts = [width - count if left else 0 for count in counts]
        self._write: Tensor | slice
        self._tokens: Tensor | None = None  # which of the pass's tokens are written; None = all
        written = [place.columns(place.length, place.length + count) for place, count in zip(places, counts, strict=True)]
        if len(places) == 1 and written[0][-1] - written[0][0] == counts[0] - 1:
            self._write = slice(int(written[0][0]), int(written[0][-1]) + 1)
        else:
            self._write = torch.from_numpy(np.concatenate(written)).to(device)
        if min(counts) < width:
            tokens = [row * width + start + np.arange(n) for row, (start, n) in enumerate(zip(starts, counts, strict=True))]
            self._tokens = torch.from_numpy(np.concatenate(tokens)).to(device)
        self.length = max(place.length + count for place, count in zip(places, counts, strict=True))
        """Columns of the longest sequence behind the pass."""
        self._read: Tensor | None = None
        self._even: tuple[int, int, int] | None = None  # sequences at equal distances are seen in place
        if not self.first:
            apart = _distance(places)
            if apart is not None and places[-1].prompt.start + self.length <= pool.columns:
                self._even = (len(places), places[0].prompt.start, apart)
            else:
                # Columns beyond a sequence's length are hidden by the mask.
                ends = [place.length + count for place, count in zip(places, counts, strict=True)]
                found = np.empty((len(places), self.length), dtype=np.int64)
                for row, (place, end) in enumerate(zip(places, ends, strict=True)):
                    found[row, :end] = place.columns(0, end)
                    found[row, end:] = found[row, 0]  # its own, not somebody's whose numbers may have overflowed
                self._read = torch.from_numpy(found).to(device)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[b, heads, s, d]``; all that may be seen, ``[b, heads, length, d]``, in the type given.

        Keys and values of a first pass come back as they are, unrounded.
        """
        return self._update(0, self._pool.keys[layer], layer, key), self._update(1, self._pool.values[layer], layer, value)

    def _update(self, kind: int, buffer: Tensor, layer: int, new: Tensor) -> Tensor:
        flat = new.transpose(0, 1).flatten(1, 2)  # [heads, b * s, d]
        if self._tokens is not None:
            flat = flat[:, self._tokens]
        scales = None if self._pool.scales is None else self._pool.scales[kind, layer]
        if scales is None:
            buffer[:, self._write] = flat.to(buffer.dtype)
        else:
            buffer[:, self._write], scales[:, self._write] = to_int8(flat)
        if self.first:
            return new
        found = self._seen(buffer)
        if scales is not None:
            found = found * self._seen(scales).unsqueeze(-1)
        return found.to(new.dtype)

    def _seen(self, buffer: Tensor) -> Tensor:
        """``[b, heads, length, ...]`` of a buffer ``[heads, columns, ...]``, a view where that can be."""
        if self._even is None:
            return buffer[:, self._read].transpose(0, 1)
        count, start, apart = self._even
        heads, column, *rest = buffer.stride()
        shape = (count, buffer.shape[0], self.length, *buffer.shape[2:])
        offset = buffer.storage_offset() + start * column
        return buffer.as_strided(shape, (apart * column, heads, column, *rest), offset)


def _distance(places: Sequence[Place]) -> int | None:
    """Columns from one sequence to the next, if each lies in one run and all are equally far apart."""
    starts = [place.prompt.start for place in places]
    apart = starts[1] - starts[0] if len(starts) > 1 else 0
    even = all(place.straight for place in places) and all(b - a == apart for a, b in itertools.pairwise(starts))
    return apart if even and apart >= 0 else None
