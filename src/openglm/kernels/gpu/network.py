"""Whole passes through a ``GLM130B`` on one GPU: a token for each row of a batch, or prompts. Twin: ``GLM130B.forward``.

A step is some ten kernels a layer, all positions, lengths and places in device memory, so that it is captured once in a CUDA
graph and then replayed by one call. Prompts go through torch's matrix products and attention instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openglm.kernels.gpu.attention import attend
from openglm.kernels.gpu.fused import geglu, normalize, rotate
from openglm.kernels.gpu.products import BATCH, Matrix, linear, partial_products
from openglm.kernels.gpu.support import why_not

#: Bytes of the buffer into which matrices are dequantized, slice by slice, for a prompt.
SCRATCH = 192 << 20  # 8,192 rows of the 130B

Norm = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class _Layer:
    query_key_value: Matrix
    dense: Matrix
    h_to_4h: Matrix
    four_h_to_h: Matrix
    input_norm: Norm
    attention_norm: Norm


class Pass:
    """Runs tokens through a network whose matrices lie on one GPU in 4 or 8 bits, in float16 or in bfloat16, as they are.

    network: a ``GLM130B`` that ``Pass.why_not`` says nothing about. keys, values: the cache, ``[layers, slots, heads, capacity,
    d]`` each, of the network's type; a row of a batch has a place (slot) in it. graphs: replay steps as CUDA graphs; without,
    and in Triton's interpreter, each kernel is launched from Python.
    """

    def __init__(self, network: Any, keys: Tensor, values: Tensor, *, graphs: bool = True, scratch: int = SCRATCH) -> None:
        config = network.config
        self.config, self._network = config, network
        self.device, self.dtype = keys.device, keys.dtype
        self.keys, self.values = keys, values

        def norm(module: Any) -> Norm:
            return module.weight.detach(), module.bias.detach(), module.eps

        self._layers = [
            _Layer(
                Matrix.of(layer.attention.query_key_value),
                Matrix.of(layer.attention.dense),
                Matrix.of(layer.mlp.dense_h_to_4h),
                Matrix.of(layer.mlp.dense_4h_to_h),
                norm(layer.input_layernorm),
                norm(layer.post_attention_layernorm),
            )
            for layer in network.layers.values()
        ]
        self._head = Matrix.of(network.word_embeddings)
        self._final_norm = norm(network.final_layernorm)
        length = max(config.max_sequence_length, keys.shape[3])
        self._table = network.rotary.table(length, self.device, torch.float32)
        self._scratch_bytes, self._scratch = scratch, torch.empty(0, dtype=self.dtype, device=self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._capturing = graphs and self.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._capturing else None

    @staticmethod
    def why_not(network: Any) -> str:
        """One sentence that says why these kernels do not serve a network where it is; empty if they do."""
        norm = network.final_layernorm.weight
        if reason := why_not(norm.device, norm.dtype):
            return reason
        for name, module in network.named_modules():
            if not name.endswith(("word_embeddings", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")):
                continue
            if reason := Matrix.why_not(module):
                return f"the GPU kernels cannot multiply `{name}`: {reason}"
            weight = getattr(module, "codes", None)
            if weight is None and module.weight.dtype != norm.dtype:
                return f"the GPU kernels cannot multiply `{name}`: it has another type than the norms"
        return ""

    @torch.inference_mode()
    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        lengths: Tensor,
        sources: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[b, v]`` behind one token a row; its key and value go into the cache.

        All arguments are integers ``[b]`` on the network's device, any b. positions: of the tokens, below the cache's capacity
        or the model's maximum length. slots: places in the cache. lengths: columns in use; the token goes to that column.
        sources, shared: columns 0 to shared - 1 are read in slot ``sources`` instead, the rest in a row's own slot, so that
        rows share a prompt; None = nothing is shared. A row's logits do not depend on the other rows: bit for bit on a GPU of
        compute capability 8.0 or more.
        """
        sources = slots if sources is None else sources
        shared = torch.zeros_like(slots) if shared is None else shared
        arguments = (tokens, positions, slots, lengths, sources, shared)
        if len(tokens) > BATCH:
            parts = zip(*(argument.split(BATCH) for argument in arguments), strict=True)
            return torch.cat([self.step(*part) for part in parts])
        with self._on_device():
            if not self._capturing:
                return self._decode(*_typed(arguments))
            rows = len(tokens)
            graph, inputs, logits = self._graph(1 << (rows - 1).bit_length())
            inputs[2].fill_(-1)  # rows that are not there
            for buffer, argument in zip(inputs, arguments, strict=True):
                buffer[:rows].copy_(argument)
            graph.replay()
            return logits[:rows].clone()

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, slots: Tensor, last: Tensor | None = None
    ) -> Tensor:
        """Logits float32 ``[b, v]`` behind the last token of each prompt; keys and values fill columns 0 to s - 1 of its slot.

        tokens, positions: int64 ``[b, s]``. mask: bool ``[b, s, s]``, True = may attend; None = all may. slots: integers
        ``[b]``. last: int64 ``[b]``, which token of a padded prompt is its last; None = s - 1.
        """
        b, s = tokens.shape
        heads, d = self.keys.shape[2], self.keys.shape[4]
        if last is None:
            last = torch.full((b,), s - 1, device=self.device)
        if self._scratch.numel() == 0 and any(matrix.bits < 16 for layer in self._layers for matrix in _matrices(layer)):
            widest = max(matrix.columns for layer in self._layers for matrix in _matrices(layer))
            self._scratch = self._scratch.new_empty(max(self._scratch_bytes // 2, widest))
        columns = torch.arange(s, dtype=torch.int32, device=self.device).repeat(b)
        mask = None if mask is None else mask.unsqueeze(1)

        def attention(layer: int, queries: Tensor, planes: int) -> Tensor:
            key, value = (cache[layer][slots.long(), :, :s] for cache in (self.keys, self.values))
            query = queries.view(b, s, heads, d).transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).reshape(b * s, 1, -1)

        def product(x: Tensor, matrix: Matrix) -> Tensor:
            return linear(x.flatten(1), matrix, self._scratch).unsqueeze(0)

        with self._on_device():
            own = slots.to(torch.int32).repeat_interleave(s)
            rows = torch.arange(b, device=self.device) * s + last
            x = self._run(tokens.flatten(), positions.flatten(), own, columns, product, attention, deal=False, rows=rows)
            return torch.cat([self._logits(part) for part in x.split(BATCH)])

    def _decode(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, lengths: Tensor, sources: Tensor, shared: Tensor
    ) -> Tensor:
        """``step`` kernel by kernel, for at most 16 rows; tokens and positions int64, the others int32."""

        def attention(layer: int, queries: Tensor, planes: int) -> Tensor:
            return attend(queries, self.keys[layer], self.values[layer], slots, lengths, sources, shared, planes)

        return self._logits(self._run(tokens, positions, slots, lengths, partial_products, attention, deal=True))

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        columns: Tensor,
        product: Callable[[Tensor, Matrix], Tensor],
        attention: Callable[[int, Tensor, int], Tensor],
        *,
        deal: bool,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What meets the head, dealt out for it, ``[n, planes, units]``, of all tokens ``[n]`` or of some rows.

        ``product`` leaves parts of a product, ``attention`` takes a layer's number, its queries and planes. ``deal``: products
        want their columns dealt out.
        """

        def planes(matrix: Matrix) -> int:
            return matrix.planes if deal else 1

        layers, alpha = self._layers, self.config.deepnorm_alpha
        x = self._network.word_embeddings(tokens).to(self.dtype)
        normed, dealt = normalize(x, None, 1.0, layers[0].input_norm, planes(layers[0].query_key_value))
        for number, layer in enumerate(layers):
            parts = product(dealt, layer.query_key_value)
            queries = rotate(parts, self._table, positions, slots, columns, self.keys[number], self.values[number])
            parts = product(attention(number, queries, planes(layer.dense)), layer.dense)
            normed, dealt = normalize(normed, parts, alpha, layer.attention_norm, planes(layer.h_to_4h))
            dealt = geglu(product(dealt, layer.h_to_4h), normed, planes(layer.four_h_to_h))
            parts = product(dealt, layer.four_h_to_h)
            if number + 1 < len(layers):
                after = layers[number + 1]
                normed, dealt = normalize(normed, parts, alpha, after.input_norm, planes(after.query_key_value))
        if rows is not None:
            normed, parts = normed[rows], parts[:, rows]
        return normalize(normed, parts, alpha, self._final_norm, self._head.planes)[1]

    def _logits(self, dealt: Tensor) -> Tensor:
        return partial_products(dealt, self._head).sum(0)

    def _graph(self, rows: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """The captured step of so many rows, its inputs and its logits."""
        if rows not in self._graphs:
            inputs = _typed(tuple(torch.zeros(rows, dtype=torch.int64, device=self.device) for _ in range(6)))
            inputs[2].fill_(-1)
            # Once outside the graph, where kernels may be compiled; without slots it changes nothing.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # One pool for all: their replays follow each other, and logits are copied out at once.
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._decode(*inputs)
            self._graphs[rows] = graph, inputs, logits
        return self._graphs[rows]

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _typed(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Arguments of a step in the types of its kernels: tokens and positions int64, the others int32."""
    return tuple(argument.to(torch.int64 if n < 2 else torch.int32).contiguous() for n, argument in enumerate(arguments))


def _matrices(layer: _Layer) -> tuple[Matrix, ...]:
    return layer.query_key_value, layer.dense, layer.h_to_4h, layer.four_h_to_h
