"""Quantized matrices packed for the compiled kernels, and the readable twin of what these compute.

The kernels turn activations into integers of 16 bits, chunk by chunk of columns, and add up integer products: exactly
``integer_sums``, on every processor. Only the float sum over the chunks differs in its order (tests/test_cpu_kernels.py
``test_products_are_the_twins``, ``test_an_emulated_arm_adds_up_the_same_integers``).
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openglm.kernels.cpu.library import Matrix, library

PANEL = 32
LARGEST = 32512.0


def quantize_activations(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Integers int64 ``[..., k]`` of up to 32,512 and their scales float32 ``[..., k / chunk]`` of float32 ``[..., k]``."""
    chunks = x.unflatten(-1, (-1, chunk))
    largest = chunks.abs().amax(-1, keepdim=True)
    inverse = torch.where(
        largest < 1e-30, 0, torch.tensor(LARGEST) / largest
    )  # a plain number would be multiplied by 1 / largest
    return (chunks * inverse).round().flatten(-2).long(), (largest / LARGEST).squeeze(-1)


def integer_sums(codes: Tensor, values: Tensor, chunk: int) -> Tensor:
    """Sums over each chunk, int64 ``[n, k / chunk]``, of codes int8 ``[n, k]`` times integer activations ``[k]``."""
    return (codes.long() * values).unflatten(-1, (-1, chunk)).sum(-1)


def product(codes: Tensor, scales: Tensor, x: Tensor, chunk: int) -> Tensor:
    """What the kernels compute, in float64: codes int8 ``[n, k]``, scales float16 ``[n, g]``, x float32 ``[..., k]``."""
    values, own = quantize_activations(x, chunk)
    of_chunks = scales.double().repeat_interleave(codes.shape[1] // chunk // scales.shape[1], dim=1)  # [n, k / chunk]
    weights = codes.double().unflatten(-1, (-1, chunk)) * of_chunks.unsqueeze(-1)
    return (values.double().unflatten(-1, (-1, chunk)) * own.double().unsqueeze(-1)).flatten(-2) @ weights.flatten(-2).T


class PanelMatrix:
    """A quantized matrix in the kernels' layout, in huge pages of its own. ``pack`` fills it, slice by slice of its rows.

    rows, columns: of the matrix; bits: 8 or 4; group: columns a scale, a multiple of 32, None = one a row. bias: float32
    ``[rows]`` or None. halves: 2 puts the panels of both halves of the rows side by side, as GeGLU reads them. Raises
    ``MemoryError``.
    """

    def __init__(
        self, rows: int, columns: int, bits: int, group: int | None, bias: Tensor | None = None, halves: int = 1
    ) -> None:
        found = library()
        if found is None:
            raise RuntimeError("the CPU kernels are not compiled")
        self._library = found
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        padded = -(-columns // 32) * 32
        chunk = next(size for size in (128, 64, 32) if (group or padded) % size == 0)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        pointer = None if self.bias is None else self.bias.data_ptr()
        self.structure = Matrix(None, pointer, rows, padded, bits, group or padded, chunk, halves)
        reference = ctypes.byref(self.structure)
        self.nbytes = found.glm_panel_bytes(reference) * found.glm_panel_count(reference)
        """Bytes of codes and scales, padding included."""
        address = found.glm_allocate(self.nbytes)
        if not address:
            raise MemoryError(f"there is no memory for a quantized matrix of {self.nbytes / 1e9:.2f} GB")
        self.structure.panels = address
        weakref.finalize(self, found.glm_free, address, self.nbytes)

    def pack(self, first: int, codes: Tensor, scales: Tensor) -> None:
        """Rows from ``first`` on: codes int8 ``[n, columns]``, scales float16 ``[n, g]``.

        ``first`` is a multiple of 32 within its half, and the rows end with a panel or with the half.
        """
        codes, scales = codes.contiguous(), scales.contiguous()
        own = self.rows // self.structure.halves
        end = first + len(codes)
        if first % own % PANEL or (end % own % PANEL and end % own):
            raise ValueError(f"rows {first} to {end} are no whole panels")
        self._library.glm_pack(
            ctypes.byref(self.structure), first, len(codes), codes.data_ptr(), codes.shape[1], scales.data_ptr()
        )

    def unpack_rows(self, rows: Tensor) -> Tensor:
        """Dequantized rows float32 ``[n, columns]`` of indices int64 ``[n]``; for a matrix without halves."""
        matrix = self.structure
        quads = matrix.columns // 4 // (2 if self.bits == 4 else 1)  # rows of 32 x 4 bytes
        groups = matrix.columns // matrix.group
        block = quads // groups * 4 * PANEL + 2 * PANEL
        data = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(matrix.panels)))
        blocks = data.view(-1, groups, block)[rows // PANEL]  # [n, groups, block]
        own, each = rows % PANEL, torch.arange(len(rows))
        codes = blocks[..., : -2 * PANEL].unflatten(-1, (-1, PANEL, 4))[each, :, :, own]  # [n, groups, quads / groups, 4]
        scales = blocks[..., -2 * PANEL :].contiguous().view(torch.float16)[each, :, own].float()
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-2)  # [..., first or second quad, 4]
        weights = (codes.flatten(2).float() - (128 if self.bits == 8 else 8)) * scales.unsqueeze(-1)
        return weights.flatten(1)[:, : self.columns]

    def linear(self, x: Tensor) -> Tensor:
        """``x @ matrix.T + bias``: float32 ``[..., columns]`` to ``[..., rows]``; other types compute in float32."""
        flat = x.detach().reshape(-1, self.columns).float().contiguous()
        out = torch.empty(len(flat), self.rows)
        if len(flat) and self._library.glm_linear(
            ctypes.byref(self.structure),
            flat.data_ptr(),
            len(flat),
            self.columns,
            out.data_ptr(),
            self.rows,
            torch.get_num_threads(),
        ):
            raise MemoryError("there is no memory for the activations")
        return out.to(x.dtype).view(*x.shape[:-1], self.rows)

    def integer_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For tests: the sums int32 ``[rows, chunks]`` that the kernels add up for one x ``[columns]``, and its scales."""
        matrix = self.structure
        panels, chunks = self._library.glm_panel_count(ctypes.byref(matrix)), matrix.columns // matrix.chunk
        padded = torch.zeros(matrix.columns)
        padded[: self.columns] = x
        sums = torch.empty(panels, chunks, PANEL, dtype=torch.int32)
        scales = torch.empty(chunks)
        self._library.glm_sums(ctypes.byref(matrix), padded.data_ptr(), sums.data_ptr(), scales.data_ptr())
        by_half = sums.transpose(1, 2).unflatten(0, (-1, matrix.halves)).transpose(0, 1).flatten(1, 2)
        return by_half[:, : self.rows // matrix.halves].flatten(0, 1), scales


class PanelLinear(nn.Module):
    """A linear layer over a ``PanelMatrix``, for any number of rows."""

    def __init__(self, matrix: PanelMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self.matrix.linear(x)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        matrix = self.matrix
        return f"in_features={matrix.columns}, out_features={matrix.rows}, bits={matrix.bits}, group={matrix.group}"


class PanelEmbedding(nn.Module):
    """The tied matrix as a ``PanelMatrix``; rows come in the type of the weight of ``like``."""

    def __init__(self, matrix: PanelMatrix, like: Any) -> None:
        super().__init__()
        self.weight = matrix
        self._like = [like]  # in a list: it is no part of this module

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows ``[..., h]`` of tokens ``[...]``."""
        found = self.weight.unpack_rows(tokens.flatten()).to(self._like[0].weight.dtype)  # pyright: ignore[reportArgumentType]
        return found.view(*tokens.shape, -1)


def panel_product(x: Tensor, weight: PanelMatrix) -> Tensor:
    """Hidden states ``[..., h]`` times the tied matrix: ``[..., v]``. For ``GLM130B.vocabulary_product``."""
    return weight.linear(x)
