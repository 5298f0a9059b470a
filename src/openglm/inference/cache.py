"""The key/value cache: two buffers, allocated once, that grow by moving an index."""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.config import ModelConfig


class StaticCache:
    """Rotated keys and values of every layer, ``[layers, rows, heads, capacity, head size]`` each (SPEC 5.2).

    The cache owns its position: ``update`` writes behind ``length`` and hands back views of what is there, ``advance``
    moves on after a whole pass. Rows can be copied, reordered and dropped in place, which is what beams need.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.num_layers, rows, config.num_attention_heads, capacity, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # Indexing a list is cheaper than indexing a tensor, and each step asks for every layer.
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.capacity = capacity
        self.rows = rows
        """Rows in use; the buffers may hold more."""
        self.length = 0
        """Columns in use."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[rows, heads, s, d]`` behind ``length``; all so far, ``[rows, heads, length + s, d]``, in the type given.

        Views, where the cache has that type; keys and values of a first pass come back as they are, unrounded.
        """
        keys, values = self._layers[layer]
        if self.rows != keys.shape[0]:
            keys, values = keys[: self.rows], values[: self.rows]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if keys.dtype == key.dtype:
            return keys[:, :, :end], values[:, :, :end]
        if self.length == 0:
            return key, value
        return keys[:, :, :end].to(key.dtype), values[:, :, :end].to(key.dtype)

    def advance(self, count: int) -> None:
        """``count`` columns have been written by every layer."""
        self.length += count

    def select(self, rows: Tensor, start: int = 0) -> None:
        """Row i becomes the former row ``rows[i]`` (int64 ``[n]``), in the same buffers; ``n`` rows are then in use.

        ``start``: columns before it are equal already and stay. Rows may repeat, n is at most the rows allocated.
        """
        n = len(rows)
        for keys, values in self._layers:
            for buffer in (keys, values):
                part = buffer[:, :, start : self.length]
                part[:n] = part.index_select(0, rows)
        self.rows = n
