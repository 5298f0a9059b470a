"""A network of which each process holds a part of every matrix, for inference: plain modules, and two sums a layer.

Applied to a plain (or quantized) network from outside. Nothing here is differentiable; training has its own plan (`tensor.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openglm.models.glm130b import GLM130B, Layer
from openglm.parallel.cut import TensorCut
from openglm.parallel.group import TensorGroup


class RankNetwork(GLM130B):
    """One rank's part. Called with the same arguments on all ranks; each gets all logits, the same bits everywhere."""

    group: TensorGroup
    cut: TensorCut

    def embed(self, tokens: Tensor) -> Tensor:
        """Each token's vector comes from the rank that has it."""
        own = tokens - self.cut.vocabulary.start
        absent = (own < 0) | (own >= len(self.cut.vocabulary))
        found = self.word_embeddings(own.masked_fill(absent, 0))
        return self.group.sum(found.masked_fill(absent.unsqueeze(-1), 0))

    def logits(self, x: Tensor) -> Tensor:
        """Each rank computes those of its own tokens."""
        ranks = self.group.size
        widths = [len(self.config.vocabulary_share(rank, ranks)) for rank in range(ranks)]
        return self.group.join(super().logits(x), widths)


def cut_network(network: GLM130B, group: TensorGroup) -> RankNetwork:
    """Leave a network on the meta device with this rank's parts, in place; a ``RankSource`` then fills them.

    Raises ``ConfigError`` if so many ranks cannot share it.
    """
    cut = TensorCut(network.config, group.rank, group.size)
    for name, module in network.named_modules():
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            shape = cut.part(f"{name}.{leaf}").shape(tuple(tensor.shape))
            part: Any = torch.empty(shape, dtype=tensor.dtype, device="meta")
            setattr(module, leaf, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape

    def add(_module: nn.Module, _arguments: Any, out: Any) -> Tensor:
        return group.sum(out)

    for layer in network.layers.values():
        assert isinstance(layer, Layer)
        for branch in (layer.attention, layer.mlp):  # what they give is a part of a sum
            branch.register_forward_hook(add)
    network.__class__ = RankNetwork
    assert isinstance(network, RankNetwork)
    network.group, network.cut, network.heads = group, cut, cut.heads
    return network
