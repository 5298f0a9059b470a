"""One call for a whole pass: a token for each sequence, or prompts, through all layers. Its twin is ``GLM130B.forward``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openglm.kernels.cpu.library import Layer, Matrix, Network, Step, library
from openglm.kernels.cpu.panels import PanelEmbedding, PanelLinear

#: Types that the cache may have, as panels.h counts them.
CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


class Pass:
    """Runs tokens through a ``GLM130B`` on the CPU whose matrices are all ``PanelLinear``.

    The product with the vocabulary is in it if that is packed too, else the caller does it. Norms are copied to float32.
    """

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

        layers = (Layer * config.num_layers)()
        for n, layer in enumerate(network.layers.values()):
            layers[n] = Layer(
                matrix(layer.attention.query_key_value),
                matrix(layer.attention.dense),
                matrix(layer.mlp.dense_h_to_4h),
                matrix(layer.mlp.dense_4h_to_h),
                norm(layer.input_layernorm),  # pyright: ignore[reportArgumentType]
                norm(layer.post_attention_layernorm),  # pyright: ignore[reportArgumentType]
            )
        self._layers = layers
        self._network = Network(
            layers,
            norm(network.final_layernorm),
            Matrix() if head is None else head.structure,
            config.num_layers,
            config.hidden_size,
            config.inner_hidden_size,
            config.num_attention_heads,
            config.head_size,
            config.vocab_size,
            config.deepnorm_alpha,
            config.layernorm_epsilon,
        )
        self.has_head = head is not None
        self.config = config
        self.threads = torch.get_num_threads()
        self._embed = network.embed
        self._rotary = network.rotary

    @staticmethod
    def serves(network: Any) -> bool:
        """True if all matrices of the layers are packed, and whole: a rank that has a part of them must meet the others."""
        return network.heads == network.config.num_attention_heads and all(
            isinstance(matrix, PanelLinear)
            for layer in network.layers.values()
            for matrix in (
                layer.attention.query_key_value,
                layer.attention.dense,
                layer.mlp.dense_h_to_4h,
                layer.mlp.dense_4h_to_h,
            )
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
        """
        b, s = tokens.shape
        tokens = tokens.contiguous()
        length = max(place.length for place in places) + s
        rotary = self._rotary.table(max(length, self.config.max_sequence_length), tokens.device, torch.float32)[:, positions]
        rows = torch.arange(b * s) if rows is None else rows.contiguous()
        normed = torch.empty(len(rows), self.config.hidden_size)
        logits = torch.empty(len(rows), self.config.vocab_size) if self.has_head else None
        embeddings = None if self.has_head else self._embed(tokens).float().contiguous()
        mask = None if mask is None or any(place.length for place in places) else mask.contiguous()
        where = torch.tensor(
            [
                (place.prompt.start, place.shared, place.own.start, place.length, count)
                for place, count in zip(places, counts, strict=True)
            ]
        )
        step = Step(
            b,
            s,
            where.data_ptr(),
            tokens.data_ptr() if self.has_head else None,
            None if embeddings is None else embeddings.data_ptr(),
            rotary.data_ptr(),
            rotary.data_ptr() + rotary[0].numel() * 4,
            pool.keys.data_ptr(),
            pool.values.data_ptr(),
            None if pool.scales is None else pool.scales[0].data_ptr(),
            None if pool.scales is None else pool.scales[1].data_ptr(),
            pool.keys.stride(0) // self.config.head_size,
            pool.columns,
            CACHE_TYPES[pool.keys.dtype],
            None if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(-2),
            rows.data_ptr(),
            len(rows),
            normed.data_ptr(),
            None if logits is None else logits.data_ptr(),
        )
        if self._library.glm_step(ctypes.byref(self._network), ctypes.byref(step), self.threads):
            raise MemoryError("there is no memory for this pass")
        return normed if logits is None else logits
