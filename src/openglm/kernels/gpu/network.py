"""Whole passes through a ``GLM130B`` on one GPU: a token for each row of a batch, or prompts.

Twin: ``GLM130B.forward`` (tests/test_gpu_kernels.py ``test_a_pass_is_the_networks_forward``, ``test_rows_share_a_prompt``,
``test_the_engine_writes_in_them_as_in_torch``).

A step is some ten kernels a layer, all positions, lengths and places in device memory, so that it is captured once in a CUDA
graph and then replayed by one call. Prompts go through torch's matrix products and attention instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openglm.errors import InputError
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

    network: a ``GLM130B`` that ``Pass.why_not`` says nothing about. keys, values: the cache, ``[layers, heads, columns, d]``
    each, of the network's type, in which a row has runs of columns, ``longest`` together at most. graphs: replay steps as CUDA
    graphs; without, and in Triton's interpreter, each kernel is launched from Python.
    """

    has_head = True
    invariant_prompts = False

    def __init__(
        self, network: Any, keys: Tensor, values: Tensor, longest: int, *, graphs: bool = True, scratch: int = SCRATCH
    ) -> None:
        config = network.config
        self.config, self._network = config, network
        self.device, self.dtype = keys.device, keys.dtype
        self.keys, self.values, self._longest = keys, values, longest

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
        length = max(config.max_sequence_length, longest)
        self._table = network.rotary.table(length, self.device, torch.float32)
        self._scratch_bytes, self._scratch = scratch, torch.empty(0, dtype=self.dtype, device=self.device)
        #: Whether a row of a step has the same bits in any company.
        self.invariant_steps = self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) >= (8, 0)
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
        starts: Tensor,
        lengths: Tensor,
        sources: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[b, v]`` behind one token a row; its key and value go into the cache.

        All arguments are integers ``[b]`` on the network's device, any b. positions: of the tokens, below ``longest`` or the
        model's maximum length. lengths: columns of a row in use. starts: where in the cache its columns lie, but for the first
        ``shared`` of them, which lie from ``sources`` on, so that rows share a prompt; None = nothing is shared. Several rows
        may be tokens of one sequence, one behind the other. A row's logits do not depend on other sequences: bit for bit on a
        GPU of compute capability 8.0 or more.
        """
        sources = starts if sources is None else sources
        shared = torch.zeros_like(starts) if shared is None else shared
        arguments = (tokens, positions, starts, lengths, sources, shared)
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
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        starts: Tensor,
        counts: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[n, v]`` behind some tokens of prompts; keys and values go to columns from ``starts`` on.

        tokens, positions: int64 ``[b, s]``. mask: bool ``[b, s, s]``, True = may attend; None = all may. starts: integers
        ``[b]``. counts: integers ``[b]``, tokens of prompts that are padded on the right; None = s. rows: int64 ``[n]`` into
        ``[b * s]``; None = the last token of each prompt.
        """
        b, s = tokens.shape
        heads, d = self.keys.shape[1], self.keys.shape[3]
        if counts is None:
            counts = torch.full((b,), s, device=self.device)
        if rows is None:
            rows = torch.arange(b, device=self.device) * s + counts - 1
        if self._scratch.numel() == 0 and any(matrix.bits < 16 for layer in self._layers for matrix in _matrices(layer)):
            widest = max(matrix.columns for layer in self._layers for matrix in _matrices(layer))
            self._scratch = self._scratch.new_empty(max(self._scratch_bytes // 2, widest))
        token = torch.arange(s, device=self.device)
        columns = torch.where(token < counts[:, None], starts[:, None] + token, -1)  # padding goes nowhere
        seen = columns.clamp(min=0).long()
        mask = None if mask is None else mask.unsqueeze(1)

        def attention(layer: int, queries: Tensor, planes: int) -> Tensor:
            key, value = (cache[layer][:, seen].transpose(0, 1) for cache in (self.keys, self.values))
            query = queries.view(b, s, heads, d).transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).reshape(b * s, 1, -1)

        def product(x: Tensor, matrix: Matrix) -> Tensor:
            return linear(x.flatten(1), matrix, self._scratch).unsqueeze(0)

        with self._on_device():
            to = columns.to(torch.int32).flatten()
            x = self._run(tokens.flatten(), positions.flatten(), to, product, attention, deal=False, rows=rows)
            return torch.cat([self._logits(part) for part in x.split(BATCH)])

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
        """A pass as ``kernels.cpu.network.Pass`` makes it, over the pool that these kernels were made for.

        Several tokens of a sequence are fed as so many rows of one step, each of which sees those before it.
        """
        b, s = tokens.shape
        if pool.keys is not self.keys:
            raise ValueError("these kernels were made for another cache")

        def integers(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, device=self.device)

        if all(place.length == 0 for place in places):
            starts = integers([place.prompt.start for place in places])
            rows = torch.arange(b * s, device=self.device) if rows is None else rows.to(self.device)
            return self.prefill(tokens, positions, mask, starts, integers(counts), rows)
        fed = [(row, token) for row, count in enumerate(counts) for token in range(count)]
        index = integers([row * s + token for row, token in fed])
        if max(places[row].length + token for row, token in fed) >= self._longest:
            raise InputError(f"a sequence has more than the {self._longest} columns that these kernels were made for")
        where = [
            (places[row].own.start, places[row].length + token, places[row].prompt.start, places[row].shared)
            for row, token in fed
        ]
        found = self.step(tokens.flatten()[index], positions.flatten()[index], *integers(where).unbind(1))
        if len(fed) < b * s:
            found = found.new_zeros(b * s, found.shape[1]).index_copy_(0, index, found)
        return found if rows is None else found[rows.to(self.device)]

    def _decode(
        self, tokens: Tensor, positions: Tensor, starts: Tensor, lengths: Tensor, sources: Tensor, shared: Tensor
    ) -> Tensor:
        """``step`` kernel by kernel, for at most 16 rows; tokens and positions int64, the others int32."""

        def attention(layer: int, queries: Tensor, planes: int) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            return attend(queries, keys, values, starts, lengths, sources, shared, self._longest, planes)

        columns = torch.where(lengths < shared, sources + lengths, starts + lengths - shared)
        columns = torch.where(starts < 0, -1, columns).to(torch.int32)
        return self._logits(self._run(tokens, positions, columns, partial_products, attention, deal=True))

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
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
            queries = rotate(parts, self._table, positions, columns, self.keys[number], self.values[number])
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
