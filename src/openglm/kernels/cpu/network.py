"""One call for a whole pass: a token for each sequence, or prompts, through all layers.

Its twin is ``GLM130B.forward`` (tests/test_cpu_kernels.py ``test_a_pass_is_the_networks_forward``).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openglm.kernels.cpu.library import Layer, Matrix, Network, Step, library
from openglm.kernels.cpu.panels import PanelEmbedding, PanelLinear

#: Types that the cache may have, as panels.h counts them.
CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}
#: The largest head, as in variant.c.
MOST_HEAD = 512
#: Bytes of weights that the processor's caches may keep from one pass to the next.
KEPT = 32 << 20


class Pass:
    """Runs tokens through a ``GLM130B`` on the CPU whose matrices are all ``PanelLinear``.

    The product with the vocabulary is in it if that is packed too, else the caller does it. Norms are copied to float32.
    A layer that is streamed takes a call of its own, and so does every run of layers between such. It has ``held()``, a context
    with the layer itself, which is one of ``stream.slots``.
    """

    #: Every row has the same bits in any company.
    invariant_prompts = invariant_steps = True

    def __init__(self, network: Any) -> None:
        config = network.config
        self._library: Any = library()
        head = network.word_embeddings.weight if isinstance(network.word_embeddings, PanelEmbedding) else None
        self._kept: list[object] = [head]

        def norm(module: torch.nn.Module) -> ctypes.Array[ctypes.c_void_p]:
            values = [getattr(module, name).detach().float().contiguous() for name in ("weight", "bias")]
            self._kept += values
            return (ctypes.c_void_p * 2)(*(value.data_ptr() for value in values))

        def matrix(module: torch.nn.Module) -> Matrix:
            assert isinstance(module, PanelLinear)
            self._kept.append(module.matrix)
            return module.matrix.structure

        def described(layer: Any) -> Layer:
            return Layer(
                *(matrix(module) for module in _matrices(layer)),
                norm(layer.input_layernorm),  # pyright: ignore[reportArgumentType]
                norm(layer.post_attention_layernorm),  # pyright: ignore[reportArgumentType]
            )

        #: Layers that run in one call: how many, and what stands in for a streamed one, or None.
        self._parts: list[tuple[int, Any]] = []
        self._layers = (Layer * config.num_layers)()
        self._slots: dict[int, Layer] = {}
        for n, layer in enumerate(network.layers.values()):
            if not hasattr(layer, "held"):
                self._layers[n] = described(layer)
                count = self._parts.pop()[0] if self._parts and self._parts[-1][1] is None else 0
                self._parts.append((count + 1, None))
                continue
            self._parts.append((1, layer))
            for slot in layer.stream.slots:
                self._slots.setdefault(id(slot), described(slot))
        self._shape = (
            config.hidden_size,
            config.inner_hidden_size,
            config.num_attention_heads,
            config.head_size,
            config.vocab_size,
            config.deepnorm_alpha,
            config.layernorm_epsilon,
        )
        self._final_norm = norm(network.final_layernorm)
        self._head = Matrix() if head is None else head.structure
        self.has_head = head is not None
        self.config = config
        self.threads = torch.get_num_threads()
        layer = next(iter(network.layers.values()))
        layer = layer.stream.slots[0] if hasattr(layer, "held") else layer
        in_layers = config.num_layers * sum(module.matrix.nbytes for module in _matrices(layer))
        self._past = in_layers + (0 if head is None else head.nbytes) > KEPT
        self._embed = network.embed
        self._rotary = network.rotary
        self._all = self._network(self._layers[0], config.num_layers, True)

    @staticmethod
    def serves(network: Any) -> bool:
        """True if all matrices of the layers are packed, and whole: a rank that has a part of them must meet the others."""
        if network.heads != network.config.num_attention_heads or network.config.head_size > MOST_HEAD:
            return False
        return all(
            isinstance(module, PanelLinear)
            for own in network.layers.values()
            for layer in (own.stream.slots if hasattr(own, "held") else [own])
            for module in _matrices(layer)
        )

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        pool: Any,
        places: Sequence[Any],
        counts: Sequence[int],
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[n, v]``, or without a head what meets it, ``[n, h]``, of all rows or some.

        tokens, positions: int64 ``[b, s]``, of which ``counts`` are real, padding on the right. pool: ``ColumnPool``, float32,
        float16 or int8, in which the sequences have ``places``, and into which the tokens' columns go. mask: bool
        ``[b, s, s]`` of prompts, True = may be attended to; behind a prompt, a token sees all before it. rows: int64 ``[n]``
        into ``[b * s]``.

        Raises ``IndexError`` for a position that the rotary tables have not, ``MemoryError``; the cache is then as it was.
        """
        (b, s), hidden = tokens.shape, self.config.hidden_size
        tokens, positions = tokens.contiguous(), positions.contiguous()
        longest = max(place.length for place in places)
        rotary = self._rotary.table(max(longest + s, self.config.max_sequence_length), tokens.device, torch.float32)
        rows = None if rows is None else rows.contiguous()
        count = b * s if rows is None else len(rows)
        normed = torch.empty(count, hidden)
        logits = torch.empty(count, self.config.vocab_size) if self.has_head else None
        whole = self.has_head and len(self._parts) == 1
        x = None if whole else self._embed(tokens).float().contiguous()
        mask = None if mask is None or longest else mask.contiguous()
        where = array.array("q")
        for place, own in zip(places, counts, strict=True):
            where.extend((place.prompt.start, place.shared, place.own.start, place.length, own))
        step = Step(
            b,
            s,
            where.buffer_info()[0],
            tokens.data_ptr() if whole else None,
            None if x is None else x.data_ptr(),
            positions.data_ptr(),
            rotary.data_ptr(),
            rotary.data_ptr() + rotary[0].nbytes,
            rotary.shape[1],
            None,
            None,
            None,
            None,
            pool.keys.stride(0) // self.config.head_size,
            pool.columns,
            CACHE_TYPES[pool.keys.dtype],
            None if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(-2),
            None if rows is None else rows.data_ptr(),
            count,
            normed.data_ptr(),
            None if logits is None else logits.data_ptr(),
        )
        if len(self._parts) == 1 and self._parts[0][1] is None:
            self._run(step, self._all, pool, 0)
            return normed if logits is None else logits
        first, last = 0, len(self._parts) - 1
        for index, (layers, streamed) in enumerate(self._parts):
            ends = index == last
            out = normed if ends else torch.empty(b * s, hidden)
            step.picked = rows.data_ptr() if ends and rows is not None else None
            step.num_picked, step.normed = len(out), out.data_ptr()
            with contextlib.nullcontext() if streamed is None else streamed.held() as slot:
                own = self._layers[first] if slot is None else self._slots[id(slot)]
                self._run(step, self._network(own, layers, ends), pool, first)
            first, x = first + layers, out  # what the next part begins with
            step.ids, step.embeddings = None, x.data_ptr()
        return normed if logits is None else logits

    def _network(self, first: Layer, layers: int, ends: bool) -> Network:
        """Some layers, the first of them given; the last ones have norm and head behind them."""
        head = self._head if ends else Matrix()
        return Network(ctypes.pointer(first), self._final_norm, head, layers, *self._shape, ends, self._past)

    def _run(self, step: Step, network: Network, pool: Any, first: int) -> None:
        before = first * pool.keys.stride(0) * pool.keys.itemsize
        step.keys, step.values = pool.keys.data_ptr() + before, pool.values.data_ptr() + before
        if pool.scales is not None:
            step.key_scales, step.value_scales = (scales[first].data_ptr() for scales in pool.scales)
        failed = self._library.glm_step(ctypes.byref(network), ctypes.byref(step), self.threads)
        if failed:
            raise _FAILURES[failed]


#: What a call came back with, as ``Failure`` of panels.h.
_FAILURES = {-1: MemoryError("there is no memory for this pass"), -2: IndexError("a position is out of range")}


def _matrices(layer: Any) -> tuple[Any, ...]:
    """The four of a layer, as ``Layer`` of panels.h has them."""
    return layer.attention.query_key_value, layer.attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
