"""A plain model read as a quantized one: its matrices are quantized as they are asked for, some rows at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from openglm.checkpoints.layout import expected_tensors, quantized_parts, scheme_of
from openglm.checkpoints.loading import ModelSource, row_slices
from openglm.config import ModelConfig, QuantizationScheme
from openglm.quantization.functional import quantize_matrix, stored_parts


class QuantizingSource:
    """A source as ``convert_source`` with the same scheme would have written it, in memory a matrix at a time.

    Raises ``ConfigError`` for a source that is quantized already, or groups that do not divide its rows.
    """

    def __init__(self, source: ModelSource, scheme: QuantizationScheme) -> None:
        self.config: ModelConfig = source.config.quantized(scheme)
        self.dtype: str = source.dtype
        self._source, self._scheme = source, scheme
        self._expected = expected_tensors(self.config)
        self._plain = expected_tensors(source.config)
        #: Name of a part to its matrix, without ``.weight``.
        self._matrices = {
            f"{matrix}.{part}": matrix
            for name, own in self._plain.items()
            if (chosen := scheme_of(name, scheme)) is not None
            for matrix in [name.removesuffix(".weight")]
            for part in quantized_parts(own.shape, chosen)
        }
        # Codes and scales are asked for one after the other; what one call has made is kept until the other fetches it.
        self._made: dict[tuple[str, int, int], Tensor] = {}
        self._current = ""

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file, or None where there is none."""
        return self._source.tokenizer_path

    @property
    def notes(self) -> list[str]:
        """What was deduced, assumed or ignored; one sentence each."""
        return self._source.notes

    def names(self) -> list[str]:
        """Names of the tensors, in the network's order."""
        return list(self._expected)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU; the caller may keep it and write to it.

        Codes int8 ``[rows, columns]``, in 4 bits ``[rows, columns / 2]``; scales float16 ``[rows, groups]``; the others as
        they are stored. Raises what the source raises, and ``KeyError`` for a name that it has not.
        """
        if name not in self._matrices:
            return self._source.tensor(name)
        return self.rows(name, 0, self._expected[name].shape[0])

    def rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Some rows of a tensor, or some columns of them, in memory of their own; of codes of 4 bits a column is a byte.

        A part is forgotten once it was handed out: to ask for it again is to quantize again.
        """
        if name not in self._matrices:
            return self._source.rows(name, start, stop, columns)
        if (name, start, stop) not in self._made:
            self._make(self._matrices[name], start, stop)
        found = self._made.pop((name, start, stop))
        return found if columns is None else found[:, columns.start : columns.stop].clone()

    def _make(self, matrix: str, start: int, stop: int) -> None:
        """Quantize some rows of a matrix, a slice of them at a time."""
        if matrix != self._current:
            self._made.clear()
            self._current = matrix
        scheme = scheme_of(f"{matrix}.weight", self._scheme)
        assert scheme is not None
        shape = self._plain[f"{matrix}.weight"].shape
        made: dict[str, list[Tensor]] = {}
        for first, last in row_slices((stop - start, *shape[1:])):
            exact = self._source.rows(f"{matrix}.weight", start + first, start + last)
            for part, tensor in stored_parts(quantize_matrix(exact, scheme), scheme).items():
                made.setdefault(part, []).append(tensor)
        for part, slices in made.items():
            self._made[f"{matrix}.{part}", start, stop] = slices[0] if len(slices) == 1 else torch.cat(slices)
