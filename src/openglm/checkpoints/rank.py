"""What one tensor-parallel rank reads of a model: its own parts, and nothing else of the large matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.checkpoints.layout import expected_tensors
from openglm.checkpoints.loading import ModelSource
from openglm.config import ModelConfig
from openglm.parallel.cut import TensorCut


class RankSource:
    """A source's part for one rank, under the same names; memory holds no more than a tensor's part."""

    def __init__(self, source: ModelSource, cut: TensorCut) -> None:
        self.config: ModelConfig = source.config
        self._source, self._cut = source, cut
        self._expected = expected_tensors(source.config)

    def names(self) -> list[str]:
        """Names of the tensors, in the network's order."""
        return self._source.names()

    def tensor(self, name: str) -> Tensor:
        """This rank's part of a tensor in its stored dtype, in memory of its own."""
        part = self._cut.part(name)
        if part.rows is None and part.columns is None:
            whole = self._source.tensor(name)
            return torch.zeros_like(whole) if part.zero else whole
        rows = part.rows or (range(self._expected[name].shape[0]),)
        if isinstance(part.columns, tuple):  # scales: few enough to read all
            found = [self._source.rows(name, own.start, own.stop)[:, list(part.columns)] for own in rows]
        else:
            found = [self._source.rows(name, own.start, own.stop, part.columns) for own in rows]
        return found[0] if len(found) == 1 else torch.cat(found)
