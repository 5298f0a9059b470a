"""Tensor parallelism for the plain network, from outside: PyTorch's DTensor plan, and what it has no style for.

Attention is cut by heads, GeGLU by inner columns, the vocabulary matrix by tokens. Biases of row-parallel layers are
added once; norms are whole on every rank, and their gradients are equal there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from openglm.models.glm130b import GLM130B, Attention, KeyValueCache, Layer


class PairedLinear(nn.Module):
    """GeGLU's first matrix as pairs of rows: ``[i, 2, h]`` instead of ``[2 i, h]``, bias ``[i, 2]``.

    A contiguous cut of the fused matrix would give one rank linear rows only and another gates only. As pairs, a cut
    along the first axis is right for any number of ranks, and a snapshot looks the same on every layout.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(to_pairs(layer.weight.detach()))
        self.bias = nn.Parameter(to_pairs(layer.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` to ``[..., 2 i / ranks]``, linear half first."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, DTensor) and isinstance(bias, DTensor):
            # Each rank's gradient of x is a part of the sum.
            whole = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
            x = whole.to_local(grad_placements=[Partial()])
            weight, bias = weight.to_local(), bias.to_local()
        return F.linear(x, from_pairs(weight), from_pairs(bias))


def to_pairs(tensor: Tensor) -> Tensor:
    """``[2 i, ...]``, linear half first, to ``[i, 2, ...]``."""
    return tensor.unflatten(0, (2, -1)).transpose(0, 1).contiguous()


def from_pairs(tensor: Tensor) -> Tensor:
    """``[i, 2, ...]`` to ``[2 i, ...]``, linear half first."""
    return tensor.transpose(0, 1).flatten(0, 1)


def is_paired(name: str) -> bool:
    """True for the parameters that ``PairedLinear`` holds, by their name in the plain network."""
    return "mlp.dense_h_to_4h." in name


class OwnMasksAttention(Attention):
    """Attention whose dropout masks differ between tensor ranks: each has other heads.

    Everything else that is dropped lies whole on every rank and must be dropped alike, so the ranks share one random
    state; here each leaves it for a while, by a number drawn from it, which recomputation draws again.
    """

    tensor_rank: int

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """As ``Attention``."""
        if not self.training or not self.dropout:
            return super().forward(x, rotary, mask, cache)
        draw = int(torch.randint(1 << 40, ()))
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(draw * 4096 + self.tensor_rank)
            return super().forward(x, rotary, mask, cache)


class _PairedParallel(ParallelStyle):
    """Cuts a ``PairedLinear`` along its first axis."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(cut))
        return module


def pair_linears(network: GLM130B) -> None:
    """Replace GeGLU's first matrices by paired ones, in place."""
    for layer in network.layers.values():
        assert isinstance(layer, Layer)
        layer.mlp.dense_h_to_4h = PairedLinear(layer.mlp.dense_h_to_4h)  # pyright: ignore[reportAttributeAccessIssue]


def parallelize_tensors(network: GLM130B, mesh: DeviceMesh) -> None:
    """Cut a network whose linears are paired over a one-dimensional mesh, in place. Weights may be on the meta device.

    Layers and the vocabulary matrix may be absent (pipeline stages).
    """
    plan: dict[str, ParallelStyle] = {}
    for number, layer in network.layers.items():
        attention = cast(OwnMasksAttention, layer.attention)
        attention.__class__ = OwnMasksAttention
        attention.tensor_rank = mesh.get_local_rank()
        plan[f"layers.{number}.attention.query_key_value"] = ColwiseParallel()
        plan[f"layers.{number}.attention.dense"] = RowwiseParallel()
        plan[f"layers.{number}.mlp.dense_h_to_4h"] = _PairedParallel()
        plan[f"layers.{number}.mlp.dense_4h_to_h"] = RowwiseParallel()
    if getattr(network, "word_embeddings", None) is not None:
        plan["word_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(network, mesh, plan, src_data_rank=None)
    network.vocabulary_product = vocabulary_parallel_product(mesh)


def vocabulary_parallel_product(mesh: DeviceMesh) -> Callable[[Tensor, Tensor], Tensor]:
    """The head over a cut matrix: logits ``[..., v]`` as a DTensor that stays cut along the vocabulary."""

    def product(x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(DTensor.from_local(x, mesh, [Replicate()], run_check=False), matrix)

    return product


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered; a collective for those that are cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(parameter: Tensor, full: Tensor) -> None:
    """Write this rank's part of ``full`` into a parameter. No collective: every rank has ``full``."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        part = distribute_tensor(full.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(part)
    else:
        parameter.copy_(full)
