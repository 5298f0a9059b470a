"""Prefill and decode: sequences in, tokens out. Knows token ids only; what they say is the business of ``GLM``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openglm.errors import InputError
from openglm.inference.cache import StaticCache
from openglm.inference.sampling import FORBIDDEN, SamplingSettings, draw, filter_logits, penalize
from openglm.infilling import Batch, Layout, Prompt
from openglm.kernels.cpu.network import Pass
from openglm.kernels.onednn import use_onednn
from openglm.models.glm130b import GLM130B
from openglm.quantization.layers import use_panels


@dataclass(frozen=True)
class Token:
    """One new token of one row."""

    row: int
    id: int
    log_probability: float
    """Of the network's own distribution: log-softmax of the logits before any penalty, temperature or filter."""
    ends: bool
    """True if the row ends with it: an end token."""


class Decoding:
    """A batch that is being written: its cache, what its rows may see, and the logits of their next tokens."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], room: int, copies: int, padding: str, multiple: int) -> None:
        """Prefill of the prompts in one piece; the cache is for ``copies`` rows of each and ``room`` more tokens."""
        device, dtype = engine.device, engine.dtype
        layouts = [prompt.layout for prompt in prompts]
        batch = Batch.stack(layouts, padding=padding, multiple=multiple, device=device)
        b, width = batch.tokens.shape
        capacity = width + room
        engine.network.rotary.table(capacity, device, dtype)  # answers may run past the model's maximum length
        self.network, self._kernel = engine.network, engine.kernel
        self.cache = StaticCache(engine.network.config, b * copies, capacity, dtype=engine.cache_dtype, device=device)
        self.cache.rows = b
        self.width = width
        """Columns of the prefill, padding included."""
        positions = np.stack([prompt.answer_positions(room) for prompt in prompts])
        self._positions = torch.from_numpy(positions).to(device)
        lengths = np.asarray([len(layout) for layout in layouts])
        last = np.full(b, width - 1) if padding == "left" else lengths - 1
        rows = torch.from_numpy(last + width * np.arange(b)).to(device)
        #: bool ``[rows, 1, capacity]``; None where nothing is hidden, which spares attention the mask. An answer token
        #: sees what the last token of its prompt sees, and the answer so far.
        self._visible: Tensor | None = None
        if (lengths < width).any():
            self._visible = torch.ones((b, 1, capacity), dtype=torch.bool, device=device)
            self._visible[:, 0, :width] = batch.mask.flatten(0, 1)[rows]
        self._step = 0
        #: float32 ``[rows, v]``: scores of the next token of each row.
        if self._kernel is None:
            logits = self.network(batch.tokens, batch.positions, batch.mask, cache=self.cache, rows=rows)
        else:
            self._kernel.threads = torch.get_num_threads()
            logits = self._in_one_call(batch.tokens, batch.positions, batch.mask, rows)
        self.logits = _single(logits)
        self.cache.advance(width)

    @torch.inference_mode()
    def append(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, int64 ``[rows]``; the logits behind it, float32 ``[rows, v]``."""
        end = self.cache.length + 1
        positions = self._positions[:, self._step : self._step + 1]
        if self._kernel is None:
            mask = None if self._visible is None else self._visible[:, :, :end]
            self.logits = _single(self.network(tokens[:, None], positions, mask, cache=self.cache)[:, 0])
        else:
            self.logits = self._in_one_call(tokens[:, None], positions, self._visible)
        self.cache.advance(1)
        self._step += 1
        return self.logits

    def _in_one_call(self, tokens: Tensor, positions: Tensor, visible: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Logits as the compiled kernels make them; the network's own forward is their twin."""
        network, kernel, cache = self.network, self._kernel, self.cache
        assert kernel is not None
        rotary = network.rotary.table(cache.capacity, tokens.device, torch.float32)[:, positions]
        found = kernel(tokens, rotary, cache.keys, cache.values, cache.length, visible, rows)
        return found if kernel.has_head else network.vocabulary_product(found, network.word_embeddings.weight)

    @torch.inference_mode()
    def select(self, rows: Sequence[int], *, shared_prompt: bool = False) -> None:
        """Row i becomes the former row ``rows[i]``. ``shared_prompt``: only answers differ, the prompts need no copying."""
        index = torch.tensor(rows, device=self.logits.device)
        self.cache.select(index, self.width if shared_prompt else 0)
        self.logits = self.logits[index]
        if not shared_prompt:
            self._positions = self._positions[index]
            self._visible = None if self._visible is None else self._visible[index]


def _single(logits: Tensor) -> Tensor:
    """Scores are compared and summed in float32, whatever the network computes in (float64 stays)."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Engine:
    """Runs a network over prompts. Weights stay where they are; dtype and device are the network's."""

    def __init__(self, network: GLM130B) -> None:
        self.network = network
        self.config = network.config
        self._anchor = network.final_layernorm.weight
        self.notes = [note] if (note := use_panels(network)) else []
        """What runs slower than it could, one sentence each."""
        use_onednn(network)
        self.kernel = Pass(network) if self.dtype == torch.float32 and Pass.serves(network) else None
        """Runs prompts and steps in one call each, where the network is quantized and on a CPU."""
        self.cache_dtype = self.dtype if self.kernel is None else torch.float16
        """Of keys and values: the network's, or half of it where the kernel reads that as fast as it comes."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return self._anchor.dtype

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[None]:
        """Where the kernels' own threads do the work, torch stays on one: its others would wait awake on their cores."""
        threads = torch.get_num_threads()
        if self.kernel is not None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Prompt], room: int, *, copies: int = 1, padding: str = "right", multiple: int = 1
    ) -> Decoding:
        """The prompts in one pass, padded on the "right" or "left" to a multiple; ready for ``room`` more tokens a row."""
        if not prompts:
            raise InputError("there is no prompt")
        return Decoding(self, prompts, room, copies, padding, multiple)

    @torch.inference_mode()
    def log_probabilities(self, layout: Layout, rows: Sequence[int]) -> Tensor:
        """Log-probabilities float32 ``[n, v]`` of what follows some tokens of one layout, in one pass without a cache."""
        batch = Batch.stack([layout], device=self.device)
        chosen = torch.tensor(rows, device=self.device)
        return _single(self.network(batch.tokens, batch.positions, batch.mask, rows=chosen)).log_softmax(-1)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        ends: Sequence[int],
        rooms: Sequence[int],
        generators: list[torch.Generator] | None = None,
        forbidden: Tensor | None = None,
        padding: str = "right",
    ) -> Generation:
        """Write all prompts side by side, greedily or by draws.

        ``ends``: tokens that end a row; ``rooms``: new tokens of each row at most; ``generators``: one a row, for draws;
        ``forbidden``: bool ``[v]``, ids that are never written. Prefill happens with the first token asked for.
        """
        return Generation(self, prompts, settings, ends, rooms, generators, forbidden, padding)


class Generation:
    """Iterate over it for tokens, row by row and step by step; ``finish(row)`` ends a row from outside."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        ends: Sequence[int],
        rooms: Sequence[int],
        generators: list[torch.Generator] | None,
        forbidden: Tensor | None,
        padding: str,
    ) -> None:
        self._engine, self._prompts, self._settings, self._padding = engine, prompts, settings, padding
        self._ends, self._rooms, self._forbidden = list(ends), list(rooms), forbidden
        self._sampling = not settings.greedy and settings.temperature > 0
        if self._sampling and (generators is None or len(generators) != len(prompts)):
            raise InputError("drawing needs one generator a prompt")
        self._generators = generators or []
        self._live = set(range(len(prompts)))

    def finish(self, row: int) -> None:
        """Write nothing more in this row."""
        self._live.discard(row)

    def __iter__(self) -> Iterator[Token]:
        decoding = self._engine.prefill(self._prompts, max(self._rooms), padding=self._padding)
        rows = list(range(len(self._prompts)))  # of the decoding, as numbers of the caller
        written = torch.zeros_like(decoding.logits, dtype=torch.bool) if self._settings.repetition_penalty != 1.0 else None
        step = 0
        while True:
            with torch.inference_mode(), self._engine.one_thread():
                tokens, log_probabilities = self._choose(decoding.logits, rows, written, step)
                if written is not None:
                    written.scatter_(1, tokens[:, None], True)
                ids, logs = tokens.tolist(), log_probabilities.tolist()
            step += 1
            for row, token, log in zip(rows, ids, logs, strict=True):
                if row in self._live:
                    ends = token in self._ends
                    if ends or step >= self._rooms[row]:
                        self.finish(row)
                    yield Token(row, token, log, ends)
            if not self._live:
                return
            with torch.inference_mode(), self._engine.one_thread():
                # Rows that are done go on without effect; once they are the half, they are dropped.
                if 2 * len(self._live) <= len(rows):
                    kept = [index for index, row in enumerate(rows) if row in self._live]
                    decoding.select(kept)
                    tokens, rows = tokens[kept], [rows[index] for index in kept]
                    written = None if written is None else written[kept]
                decoding.append(tokens)

    def _choose(self, logits: Tensor, rows: list[int], written: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability, ``[rows]`` each."""
        settings = self._settings
        log_probabilities = logits.log_softmax(-1)
        if written is not None:
            logits = penalize(logits, written, settings.repetition_penalty)
        forbidden = self._forbidden
        if step < settings.min_tokens:
            forbidden = torch.zeros_like(logits[0], dtype=torch.bool) if forbidden is None else forbidden.clone()
            forbidden[self._ends] = True
        if self._sampling:
            logits = filter_logits(
                logits, temperature=settings.temperature, forbidden=forbidden, top_k=settings.top_k, top_p=settings.top_p
            )
            tokens = draw(logits, [self._generators[row] for row in rows])
        else:
            tokens = (logits if forbidden is None else logits.masked_fill(forbidden, FORBIDDEN)).argmax(-1)
        return tokens, log_probabilities.gather(1, tokens[:, None]).squeeze(1)
