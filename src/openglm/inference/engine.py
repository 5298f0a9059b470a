"""Prefill and decode: sequences in, tokens out. Knows token ids only; what they say is the business of ``GLM``."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openglm.errors import InputError
from openglm.inference.cache import ColumnPool, Place, Run
from openglm.inference.decoding import Decoding, Kernel, single
from openglm.inference.sampling import SamplingSettings, make_generator
from openglm.inference.scheduler import Request, Scheduler, Token
from openglm.inference.speculation import Drafter
from openglm.infilling import Batch, Layout, Prompt
from openglm.kernels.cpu.network import Pass
from openglm.kernels.cpu.panels import PanelLinear
from openglm.kernels.onednn import use_onednn
from openglm.models.glm130b import GLM130B, Layer
from openglm.parallel.inference import RankNetwork
from openglm.quantization.layers import use_panels

#: Threads that torch has outside of ``one_thread``; 0 = it is not in use.
_THREADS: contextvars.ContextVar[int] = contextvars.ContextVar("threads", default=0)


class Engine:
    """Runs a network over prompts. Weights stay where they are; dtype and device are the network's."""

    def __init__(self, network: GLM130B) -> None:
        self.network = network
        self.config = network.config
        self._anchor = network.final_layernorm.weight
        self.notes = [note] if (note := use_panels(network)) else []
        """What runs slower than it could, one sentence each."""
        use_onednn(network)
        self._packed = any(isinstance(module, PanelLinear) for module in network.modules())
        self.kernel = Pass(network) if self.dtype == torch.float32 and Pass.serves(network) else None
        """Runs prompts and steps in one call each, where the network is quantized, whole, and on a CPU."""
        self.cache_dtype = self.dtype if self.kernel is None else torch.float16
        """Of keys and values: the network's, or half of it where the kernel reads that as fast as it comes."""
        self._gpu: tuple[ColumnPool, Kernel, weakref.ref[Decoding]] | None = None
        self.uses_triton = False
        """Whether passes run in the Triton kernels, on a GPU that they serve."""
        if self.device.type == "cuda":
            self.use_triton()
        self.drafter: Drafter | None = None
        """Proposes tokens that are checked several at once; see ``speculation``."""
        self.group = network.group if isinstance(network, RankNetwork) else None
        """The tensor-parallel ranks that run this network together; all of them are to be given the same requests."""

    def agree(self) -> None:
        """Under tensor parallelism: what decides which requests are computed apart becomes the same on all ranks."""
        if self.group is not None:
            self._packed = self.group.told(lambda: self._packed)

    def use_triton(self) -> None:
        """Let passes run in the Triton kernels; where that cannot be, a note says why."""
        from openglm.kernels.gpu.support import why_not

        reason = why_not(self.device, self.dtype)
        if isinstance(self.network, RankNetwork):
            reason = reason or "the GPU kernels run a whole network on one GPU"
        elif not all(isinstance(layer, Layer) for layer in self.network.layers.values()):
            reason = reason or "the GPU kernels need all layers on the GPU"
        if not reason:
            from openglm.kernels.gpu.network import Pass as GPUPass

            reason = GPUPass.why_not(self.network)
        if reason:
            self.notes.append(f"{reason}, so the network runs in plain PyTorch")
        self.uses_triton = not reason

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return self._anchor.dtype

    def set_cache_dtype(self, dtype: str | torch.dtype) -> None:
        """Keep keys and values in another type. Raises ``InputError`` for one that there is not, or not on this machine."""
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        allowed = [torch.float32, torch.float16, torch.int8] + ([torch.bfloat16] if self.kernel is None else [])
        if found not in allowed:
            names = ", ".join(str(own).removeprefix("torch.") for own in allowed)
            hint = "the compiled kernels of quantized layers know no others" if found == torch.bfloat16 else None
            raise InputError(f"the cache is kept in {names}, not in {dtype}", hint=hint, key="cache_dtype")
        self.cache_dtype = found
        if self.uses_triton and found != self.dtype:
            self.notes.append("the GPU kernels keep a cache in the network's type, so the network runs in plain PyTorch")

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[None]:
        """Where the kernels' own threads do the work, torch stays on one: its others would wait awake on their cores."""
        threads = torch.get_num_threads()
        token = _THREADS.set(_THREADS.get() or threads)
        if self.kernel is not None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            _THREADS.reset(token)
            torch.set_num_threads(threads)

    def apart(self, request: Request) -> bool:
        """Whether a request is to be computed so that no bit depends on its companions.

        Left to us, those with a seed are, where numbers are rounded so much that it shows: in half precision and quantized. In
        float32 a companion changes a text only where two tokens tie within 1e-5.
        """
        asked = request.settings.deterministic
        return asked if asked is not None else request.settings.seed is not None and self.rounds

    @property
    def rounds(self) -> bool:
        """Whether it computes in half precision or in kernels for quantized weights."""
        return self._packed or self.dtype.itemsize < 4

    def generator(self, settings: SamplingSettings) -> torch.Generator:
        """The generator of one text; without a seed it starts anywhere, but at the same place on all ranks."""
        seed = settings.seed
        if seed is None and self.group is not None and not settings.greedy:
            seed = self.group.told(lambda: make_generator(None).initial_seed())
        return make_generator(seed)

    def decoding(self, columns: int, *, padding: str = "right", triton: bool = True) -> Decoding:
        """Room for sequences of so many columns together, prompts and answers. ``triton`` False: in plain PyTorch on a GPU."""
        if triton and self.uses_triton and self.cache_dtype == self.dtype and padding == "right":
            return self._in_triton(columns)
        if self.kernel is not None:
            self.kernel.threads = _THREADS.get() or torch.get_num_threads()
        heads = self.network.heads
        pool = ColumnPool(self.config, columns, dtype=self.cache_dtype, device=self.device, heads=heads)
        return Decoding(self.network, self.kernel, pool, padding=padding)

    def _in_triton(self, columns: int) -> Decoding:
        """Over a cache that is kept, with its kernels, for the next time: CUDA graphs are captured with addresses."""
        from openglm.kernels.gpu.network import Pass as GPUPass

        found = self._gpu
        user = None if found is None else found[2]()
        if found is None or found[0].columns < columns or (user is not None and not user.released):
            self._gpu = None  # its memory first
            columns = max(columns, self.config.max_sequence_length)
            pool = ColumnPool(self.config, columns, dtype=self.dtype, device=self.device)
            longest = min(columns, 2 * self.config.max_sequence_length)
            kernel: Kernel = GPUPass(self.network, pool.keys, pool.values, longest)
        else:
            pool, kernel = found[:2]
            pool.clear()
        made = Decoding(self.network, kernel, pool)
        self._gpu = pool, kernel, weakref.ref(made)
        return made

    def prefill(self, prompts: Sequence[Prompt], room: int, *, copies: int = 1, padding: str = "right") -> Decoding:
        """The prompts in one pass, padded on the "right" or "left"; ready for ``room`` more tokens a row, and for forking
        each into ``copies`` rows."""
        if not prompts:
            raise InputError("there is no prompt")
        columns = sum(len(prompt.layout) + copies * room for prompt in prompts)
        made = self.decoding(columns, padding=padding)
        made.add(prompts, [room] * len(prompts), [copies] * len(prompts))
        return made

    def scheduler(self, columns: int, *, most_rows: int = 256, padding: str = "right") -> Scheduler:
        """Runs requests side by side over a cache of so many columns."""
        return Scheduler(self, columns, most_rows=most_rows, padding=padding, drafter=self.drafter)

    @torch.inference_mode()
    def log_probabilities(self, layout: Layout, rows: Sequence[int]) -> Tensor:
        """Log-probabilities float32 ``[n, v]`` of what follows some tokens of one layout, in one pass without a cache."""
        batch = Batch.stack([layout], device=self.device)
        chosen = torch.tensor(rows, device=self.device)
        if self.kernel is None:
            logits = self.network(batch.tokens, batch.positions, batch.mask, rows=chosen)
        else:
            pool = ColumnPool(self.config, len(layout), dtype=torch.float32, layers=1)
            pool.keys, pool.values = (part.expand(self.config.num_layers, -1, -1, -1) for part in (pool.keys, pool.values))
            place = Place(Run(0, len(layout)), Run(0, 0), len(layout), 0)
            with self.one_thread():
                logits = self.kernel(batch.tokens, batch.positions, pool, [place], [len(layout)], batch.mask, chosen)
            if not self.kernel.has_head:
                logits = self.network.vocabulary_product(logits, self.network.word_embeddings.weight)
        return single(logits).log_softmax(-1)

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
        if not prompts:
            raise InputError("there is no prompt")
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
        columns = sum(len(prompt.layout) + room for prompt, room in zip(prompts, rooms, strict=True))
        self._scheduler = engine.scheduler(columns, most_rows=len(prompts), padding=padding)
        drawn: Sequence[torch.Generator | None] = generators or [None] * len(prompts)
        self._requests = [
            self._scheduler.submit(Request(prompt, settings, ends, room, generator, forbidden))
            for prompt, room, generator in zip(prompts, rooms, drawn, strict=True)
        ]
        self._finished: set[int] = set()

    def finish(self, row: int) -> None:
        """Write nothing more in this row."""
        self._finished.add(row)
        self._scheduler.cancel(self._requests[row])

    def __iter__(self) -> Iterator[Token]:
        for token in self._scheduler.run():
            # A row may have been finished by the reader while others of the same step were handed out.
            if token.row not in self._finished:
                yield token
