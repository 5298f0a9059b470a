"""One call for a whole pass: a token for each sequence, or prompts, through all layers. Its twin is ``GLM130B.forward``."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from openglm.kernels.cpu.library import Layer, Matrix, Network, Step, library
from openglm.kernels.cpu.panels import PanelEmbedding, PanelLinear

#: Types that the cache may have, as panels.h counts them.
CACHE_TYPES = {torch.float32: 0, torch.float16: 1}


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

    @staticmethod
    def serves(network: Any) -> bool:
        """True if all matrices of the layers are packed."""
        return all(
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
        rotary: Tensor,
        keys: Tensor,
        values: Tensor,
        length: int,
        visible: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 ``[n, v]``, or without a head what meets it, ``[n, h]``, of all rows or some.

        tokens: int64 ``[b, s]``. rotary: float32 ``[2, b, s, d]``, cosines and sines of the positions. keys, values: float32 or
        float16 ``[layers, at least b, heads, capacity, d]``; columns ``length`` to ``length + s`` are written. visible: bool
        ``[b, s, at least length + s]``, True = may be attended to; None = all. rows: int64 ``[n]``, indices into ``[b * s]``.
        """
        b, s = tokens.shape
        tokens, rotary = tokens.contiguous(), rotary.contiguous()
        rows = torch.arange(b * s) if rows is None else rows.contiguous()
        normed = torch.empty(len(rows), self.config.hidden_size)
        logits = torch.empty(len(rows), self.config.vocab_size) if self.has_head else None
        embeddings = None if self.has_head else self._embed(tokens).float().contiguous()
        if visible is not None:
            visible = visible.contiguous()
        step = Step(
            b,
            s,
            tokens.data_ptr() if self.has_head else None,
            None if embeddings is None else embeddings.data_ptr(),
            rotary.data_ptr(),
            rotary.data_ptr() + rotary[0].numel() * 4,
            keys.data_ptr(),
            values.data_ptr(),
            *keys.stride()[:3],
            CACHE_TYPES[keys.dtype],
            length,
            None if visible is None else visible.data_ptr(),
            0 if visible is None else visible.stride(-2),
            rows.data_ptr(),
            len(rows),
            normed.data_ptr(),
            None if logits is None else logits.data_ptr(),
        )
        if self._library.glm_step(ctypes.byref(self._network), ctypes.byref(step), self.threads):
            raise MemoryError("there is no memory for this pass")
        return normed if logits is None else logits
