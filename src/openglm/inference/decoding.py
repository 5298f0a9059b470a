"""Sequences that are being written side by side: their places in the cache, and the logits of their next tokens.

Prompts are read whole, for part A is seen by everybody; only then they are written on, a token (or a few) of each at a time.
Sequences may join and leave between any two steps. Prompts that are equal are read once, and kept once; in unidirectional mode
so is a beginning that they have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openglm.errors import InputError
from openglm.inference.cache import ColumnPool, Place, PoolView, Run
from openglm.infilling import Batch, Prompt
from openglm.models.glm130b import GLM130B


class Kernel(Protocol):
    """What runs a whole pass in place of the network: ``kernels.cpu.network.Pass``, ``kernels.gpu.network.Pass``."""

    @property
    def has_head(self) -> bool:
        """Logits come back; else what meets the vocabulary's matrix."""
        ...

    @property
    def invariant_prompts(self) -> bool:
        """A prompt's numbers have the same bits whatever is read with it."""
        ...

    @property
    def invariant_steps(self) -> bool:
        """So have a token's, alone or with others, of its own sequence too."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        pool: ColumnPool,
        places: Sequence[Place],
        counts: Sequence[int],
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[b * s, v]`` of all tokens int64 ``[b, s]``, or ``[n, v]`` of some rows of them; without a head
        what meets it, ``[..., h]``.

        mask: bool ``[b, s, s]`` of prompts; None: each token sees what is before it, and itself. Raises ``MemoryError``.
        """
        ...


#: Tokens that two prompts must have in common before one is read as the continuation of the other.
LEAST_BEGINNING = 16


@dataclass(eq=False)
class _Shared:
    """A prompt in the cache, and who uses it."""

    prompt: Prompt
    key: bytes
    run: Run
    logits: Tensor
    """float ``[v]``, behind the prompt."""
    alone: bool
    users: int = 0


@dataclass(eq=False)
class _Family:
    """The sequences of one request: a row, and those that it forks into."""

    shared: _Shared
    """Who holds the columns that they share: their prompt, or one that begins alike."""
    spare: list[Run]
    """Runs of columns that were taken for them and that none of them has."""
    rows: int = 1


@dataclass(eq=False)
class Row:
    """One sequence."""

    family: _Family
    prompt: Prompt
    place: Place
    alone: bool
    """Computed by itself, so that no bit of its numbers depends on who is beside it."""

    @property
    def written(self) -> int:
        """Tokens behind the prompt."""
        return self.place.length - len(self.prompt.layout)

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        return self.place.shared + self.place.own.count - self.place.length


class Decoding:
    """Sequences over one pool of columns. Row i of ``logits`` belongs to ``rows[i]``.

    Prompts read in one pass are padded on the "right", or on the "left".
    """

    def __init__(self, network: GLM130B, kernel: Kernel | None, pool: ColumnPool, *, padding: str = "right") -> None:
        self._network, self._kernel, self.pool, self._padding = network, kernel, pool, padding
        self._prompts: dict[bytes, _Shared] = {}
        self.rows: list[Row] = []
        self.released = False
        self.logits = torch.empty(0, network.config.vocab_size, device=pool.keys.device)
        """float32 ``[rows, v]`` (float64 where the network is): scores of the next token of each."""

    @property
    def invariant_steps(self) -> bool:
        """Whether a token's numbers have the same bits in any company, and with others of its own sequence."""
        return self._kernel is not None and self._kernel.invariant_steps

    # -----------------------------------------------------------------------------------------------------------------
    # Sequences come and go

    def needs(
        self, prompts: Sequence[Prompt], rooms: Sequence[int], copies: Sequence[int], alone: Sequence[bool] | None = None
    ) -> list[int]:
        """Columns that rows for these prompts would take, run by run; a prompt that is there already takes none."""
        known, runs = {key: shared.prompt for key, shared in self._prompts.items()}, list[int]()
        for index, (prompt, room, count) in enumerate(zip(prompts, rooms, copies, strict=True)):
            apart = alone is not None and alone[index]
            key = _key(prompt, apart)
            if key in known:
                runs += [room] * count
            elif begun := self._beginning(prompt, apart, known)[1]:
                runs += [len(prompt.layout) - begun + room] * count
            else:
                known[key] = prompt
                runs += [len(prompt.layout) + room, *[room] * (count - 1)]
        return runs

    def _beginning(self, prompt: Prompt, alone: bool, known: Mapping[bytes, Prompt]) -> tuple[bytes, int]:
        """The prompt in the cache that begins as this one does for the longest, and for how many tokens; 0 = none is worth it.

        Only where a token depends on nothing behind it, in prompts that are read from left to right throughout.
        """
        best, longest = b"", LEAST_BEGINNING - 1
        if prompt.layout.context == 0 and not alone:
            for key, other in known.items():
                size = min(len(other.layout), len(prompt.layout) - 1)
                if other.layout.context or size <= longest:
                    continue
                mine, theirs = prompt.layout, other.layout
                equal = (mine.tokens[:size] == theirs.tokens[:size]) & (mine.positions[:size] == theirs.positions[:size])
                same = size if equal.all() else int(equal.argmin())
                if same > longest:
                    best, longest = key, same
        return best, longest if best else 0

    @torch.inference_mode()
    def add(
        self, prompts: Sequence[Prompt], rooms: Sequence[int], copies: Sequence[int], alone: Sequence[bool] | None = None
    ) -> None:
        """One more row for each prompt, each with room for so many tokens, able to fork into ``copies`` rows.

        Prompts that are not in the cache yet are read in one pass, those of rows ``alone`` in passes of their own. Raises
        ``MemoryError`` where the pool is too small. Whatever it raises, everything is then as it was.
        """
        alone = [False] * len(prompts) if alone is None else alone
        if not self.pool.fits(self.needs(prompts, rooms, copies, alone)):
            raise MemoryError("the cache has no room for these prompts and their answers")
        new: list[_Shared] = []
        rows: list[Row] = []
        for prompt, room, count, apart in zip(prompts, rooms, copies, alone, strict=True):
            key, length = _key(prompt, apart), len(prompt.layout)
            if key in self._prompts:
                shared, begun, own = self._prompts[key], length, self.pool.take(room)
            else:
                known = {key: shared.prompt for key, shared in self._prompts.items()}
                other, begun = self._beginning(prompt, apart, known)
                if begun:
                    shared, own = self._prompts[other], self.pool.take(length - begun + room)
                else:
                    whole, begun = self.pool.take(length + room), length
                    run, own = Run(whole.start, length), Run(whole.start + length, room)
                    shared = self._prompts[key] = _Shared(prompt, key, run, self.logits.new_empty(0), apart)
                    new.append(shared)
            shared.users += 1
            family = _Family(shared, [self.pool.take(own.count) for _ in range(count - 1)])
            rows.append(Row(family, prompt, Place(shared.run, own, begun, begun), apart))
        try:
            found = self._read_prompts(new, rows)
        except BaseException:
            for row in rows:
                self._drop(row)
            raise
        self.rows += rows
        self.logits = torch.cat([self.logits, torch.stack(found)]) if len(self.logits) else torch.stack(found)

    def _read_prompts(self, new: list[_Shared], rows: list[Row]) -> list[Tensor]:
        """Logits behind the prompt of each row, of which some are new."""
        same = self._kernel is not None and self._kernel.invariant_prompts
        for part in _passes([shared.alone and not same for shared in new]):
            chosen = [new[index] for index in part]
            for shared, logits in zip(chosen, self._read(chosen), strict=True):
                shared.logits = logits
        found = [row.family.shared.logits for row in rows]
        behind = [index for index, row in enumerate(rows) if row.written < 0]
        if behind:
            for index, logits in zip(behind, self._read_on([rows[index] for index in behind]), strict=True):
                found[index] = logits
        return found

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes the former row ``rows[i]``; one that appears again is forked: its answer so far is copied."""
        kept, old = set(rows), self.rows
        for index, row in enumerate(old):
            if index not in kept:
                self._drop(row)
        chosen: list[Row] = []
        seen: set[int] = set()
        for index in rows:
            row = old[index]
            if index in seen:
                row = self._fork(row)
            seen.add(index)
            chosen.append(row)
        if list(rows) != list(range(len(old))):
            self.logits = self.logits[torch.tensor(rows, dtype=torch.int64, device=self.logits.device)]
        self.rows = chosen

    def release(self) -> None:
        """Drop all rows for good; their columns are free."""
        self.select([])
        self.released = True

    def _fork(self, row: Row) -> Row:
        place, family = row.place, row.family
        own = family.spare.pop() if family.spare else self.pool.take(place.own.count)
        made = Place(place.prompt, own, place.shared, place.length)
        self.pool.copy(place.columns(place.shared, place.length), made.columns(place.shared, place.length))
        family.rows += 1
        return Row(family, row.prompt, made, row.alone)

    def _drop(self, row: Row) -> None:
        family = row.family
        family.rows -= 1
        family.spare.append(row.place.own)
        if family.rows:
            return
        for run in family.spare:
            self.pool.give_back(run)
        shared = family.shared
        shared.users -= 1
        if not shared.users:
            self.pool.give_back(shared.run)
            del self._prompts[shared.key]

    # -----------------------------------------------------------------------------------------------------------------
    # Passes

    def _read(self, new: list[_Shared]) -> Tensor:
        """Logits ``[n, v]`` behind prompts, which go into the cache."""
        layouts = [shared.prompt.layout for shared in new]
        batch = Batch.stack(layouts, padding=self._padding, device=self.pool.keys.device)
        width = batch.tokens.shape[1]
        counts = [shared.run.count for shared in new]
        places = [Place(shared.run, shared.run, shared.run.count, 0) for shared in new]
        left = self._padding == "left"
        last = torch.tensor([row * width + (width if left else count) - 1 for row, count in enumerate(counts)])
        alone = any(shared.alone for shared in new)
        return self._pass(batch.tokens, batch.positions, batch.mask, places, counts, alone, last, left)

    def _read_on(self, rows: list[Row]) -> Tensor:
        """Logits ``[n, v]`` behind prompts of which the beginning is in the cache."""
        layouts = [row.prompt.layout for row in rows]
        starts = [row.place.length for row in rows]
        counts = [len(layout) - start for layout, start in zip(layouts, starts, strict=True)]
        tokens, positions = np.zeros((2, len(rows), max(counts)), dtype=np.int64)
        for index, (layout, start, count) in enumerate(zip(layouts, starts, counts, strict=True)):
            tokens[index, :count], positions[index, :count] = layout.tokens[start:], layout.positions[start:]
        device = self.pool.keys.device
        last = torch.tensor([index * max(counts) + count - 1 for index, count in enumerate(counts)])
        mask = self._causal(starts, counts, max(counts))
        where = [row.place for row in rows]
        ids, places = torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device)
        logits = self._pass(ids, places, mask, where, counts, False, last)
        for row, count in zip(rows, counts, strict=True):
            row.place.length += count
        return logits

    def _causal(self, lengths: Sequence[int], counts: Sequence[int], s: int) -> Tensor:
        """bool ``[n, s, t]``: each of s tokens sees what is before it, and itself."""
        seen = np.asarray(lengths)[:, None] + np.arange(1, s + 1)
        longest = max(length + count for length, count in zip(lengths, counts, strict=True))
        return torch.from_numpy(np.arange(longest) < seen[:, :, None]).to(self.pool.keys.device)

    def append(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Feed one token a row, int64 ``[rows]``; the logits behind it ``[rows, v]``.

        Or some: ``[rows, s]``, ``counts`` of each row, what is beyond them is ignored; then ``[rows, s, v]`` come back, of
        which the last of each row stays in ``logits``. ``shorten`` takes tokens back.
        """
        several = tokens.dim() == 2
        tokens = tokens if several else tokens[:, None]
        counts = [tokens.shape[1]] * len(self.rows) if counts is None else list(counts)
        for row, count in zip(self.rows, counts, strict=True):
            if count > row.room:
                raise InputError(f"a sequence has room for {row.room} more tokens, not for {count}")
        logits = self._feed(tokens, counts)
        if tokens.shape[1] == 1:
            self.logits = logits[:, 0]
        else:
            last = torch.tensor([count - 1 for count in counts], device=logits.device)
            self.logits = logits[torch.arange(len(logits), device=logits.device), last]
        return logits if several else self.logits

    def _feed(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Logits ``[rows, s, v]`` behind tokens ``[rows, s]``, which go into the cache."""
        parts = _passes([row.alone and not self.invariant_steps for row in self.rows])
        if len(parts) == 1:
            logits = self._step(tokens, parts[0], counts)
        else:
            found = [self._step(tokens[part], part, [counts[index] for index in part]) for part in parts]
            order = np.argsort([index for part in parts for index in part])
            logits = torch.cat(found)[torch.from_numpy(order).to(tokens.device)]
        for row, count in zip(self.rows, counts, strict=True):
            row.place.length += count
        return logits

    def shorten(self, row: int, count: int) -> None:
        """Take the last ``count`` tokens of a row back; its logits are then the caller's to set."""
        self.rows[row].place.length -= count

    def _step(self, tokens: Tensor, rows: list[int], counts: list[int]) -> Tensor:
        """Logits ``[n, s, v]`` behind tokens ``[n, s]`` of some rows."""
        device, (b, s) = tokens.device, tokens.shape
        chosen = [self.rows[index] for index in rows]
        if s == 1:
            following = [[row.prompt.answer_start + row.prompt.answer_step * row.written] for row in chosen]
            positions = torch.tensor(following, device=device)
        else:
            # Padding has the position of its row's last token: it may be the last one that there is.
            offsets = np.minimum(np.arange(s), np.asarray(counts)[:, None] - 1)
            first = np.asarray([row.written for row in chosen])[:, None] + offsets
            start = np.asarray([[row.prompt.answer_start, row.prompt.answer_step] for row in chosen])
            positions = torch.from_numpy(start[:, :1] + start[:, 1:] * first).to(device)
        mask = None
        if self._kernel is None:
            lengths = [row.place.length for row in chosen]
            mask = self._causal(lengths, counts, s) if s > 1 or len(set(lengths)) > 1 else None
        alone = any(row.alone for row in chosen)
        logits = self._pass(tokens, positions, mask, [row.place for row in chosen], counts, alone)
        return logits.view(b, s, -1)

    def _pass(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        places: list[Place],
        counts: list[int],
        alone: bool,
        rows: Tensor | None = None,
        left: bool = False,
    ) -> Tensor:
        """Logits of all tokens ``[b * s, v]``, or of some ``[n, v]``."""
        if self._kernel is not None and not left:
            if self._kernel.has_head:
                return single(self._kernel(tokens, positions, self.pool, places, counts, mask, rows))
            with torch.inference_mode():
                found = self._kernel(tokens, positions, self.pool, places, counts, mask, rows)
                parts = found.split(1 if alone else len(found))
                return single(
                    torch.cat([self._network.vocabulary_product(part, self._network.word_embeddings.weight) for part in parts])
                )
        with torch.inference_mode():
            view = PoolView(self.pool, places, counts, left=left)
            hidden = self._network.hidden_states(tokens, positions, mask, cache=view).flatten(0, 1)
            return single(self._network.logits(hidden if rows is None else hidden[rows.to(hidden.device)]))


def _passes(alone: Sequence[bool]) -> list[list[int]]:
    """Which rows are computed together."""
    together = [index for index, own in enumerate(alone) if not own]
    return [*([together] if together else []), *([index] for index, own in enumerate(alone) if own)]


def _key(prompt: Prompt, alone: bool) -> bytes:
    """The same for prompts that the network reads alike."""
    layout = prompt.layout
    numbers = np.asarray([alone, layout.context, prompt.answer_start, prompt.answer_step, *layout.positions, *layout.tokens])
    return numbers.tobytes()


def single(logits: Tensor) -> Tensor:
    """Scores are compared and summed in float32, whatever the network computes in (float64 stays)."""
    return logits if logits.dtype == torch.float64 else logits.float()
