"""The part of the network that one process computes, and how the plain network becomes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from openglm.infilling import NO_TARGET
from openglm.kernels.compiled import compile_layers
from openglm.models.glm130b import GLM130B, Layer
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.tensor import from_pairs, is_paired, pair_linears, parallelize_tensors, put, to_pairs, whole


class RecomputedLayer(Layer):
    """A layer that keeps only its input and is computed again in the backward pass (SPEC 9.1.2).

    A class of its own rather than a wrapper, so that parameter names stay what they are.
    """

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """As ``Layer``."""
        if not torch.is_grad_enabled():
            return super().forward(x, rotary, mask, cache)
        return checkpoint(super().forward, x, rotary, mask, cache, use_reentrant=False)


def recompute_layers(layers: Iterable[nn.Module]) -> None:
    """Turn plain layers into recomputed ones, in place."""
    for layer in layers:
        layer.__class__ = RecomputedLayer


class Stage(GLM130B):
    """Some layers of the network, with the vocabulary matrix at the ends. Parameter names are the network's.

    The first stage takes tokens, the others hidden states; the last returns losses, the others hidden states.
    """

    def __init__(self, network: GLM130B, layers: range) -> None:
        nn.Module.__init__(self)
        self.config = network.config
        self.rotary = network.rotary
        self.input_gradient_factor = network.input_gradient_factor
        self.output_gradient_factor = network.output_gradient_factor
        self.vocabulary_product = network.vocabulary_product
        self.first = layers.start == 0
        self.last = layers.stop == network.config.num_layers
        self.word_embeddings = network.word_embeddings if self.first or self.last else None  # pyright: ignore[reportAttributeAccessIssue]
        self.layers = nn.ModuleDict({str(n): network.layers[str(n)] for n in layers})
        self.final_layernorm = network.final_layernorm if self.last else None  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x: int64 tokens ``[b, s]`` or hidden states ``[b, s, h]``; positions and targets int64 ``[b, s]``; mask bool
        ``[b, s, s]``. Returns hidden states, or losses in nats, float32 ``[b, s]``, 0 where there is no target."""
        if self.first:
            x = self.embed(x)
        x = self.run_layers(x, positions, mask)
        return self.losses(x, targets) if self.last else x

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy float32 ``[b, s]`` of hidden states ``[b, s, h]``; only rows with a target meet the vocabulary."""
        places = (targets != NO_TARGET).nonzero(as_tuple=True)
        losses = F.cross_entropy(self.logits(x[places]).float(), targets[places], reduction="none")
        if isinstance(losses, DTensor):
            losses = losses.to_local()
        return losses.new_zeros(targets.shape).index_put(places, losses)


def parallelize(
    network: GLM130B,
    layout: ParallelLayout,
    mesh: DeviceMesh,
    *,
    precision: str = "float32",
    recompute: bool = False,
    reshard: bool = False,
    compile: bool = False,
) -> Stage:
    """This process's part of a plain network on ``mesh`` (of ``layout.mesh``), sharded over the data axis.

    ``network`` may lie on the meta device and is used up; its weights are then drawn with ``fill``. ``precision``:
    "float32", "bfloat16" or "float16" for computing, with float32 master weights and gradients sums. ``reshard``: free a
    layer's gathered weights after its forward pass (ZeRO-3) instead of keeping them till the backward (ZeRO-2). ``compile``:
    compile the layers.
    """
    layout.check(network.config)
    pair_linears(network)
    stage = Stage(network, layout.stage_layers(network.config.num_layers)[mesh["pipeline"].get_local_rank()])
    if layout.tensor > 1:
        parallelize_tensors(stage, mesh["tensor"])
    if recompute:
        recompute_layers(stage.layers.values())
    if compile:
        compile_layers(stage.layers.values())
    dtype = getattr(torch, precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in stage.layers.values():
        fully_shard(layer, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=reshard)
    # The root holds the vocabulary matrix and the last norm; with a pipeline it must stay gathered between micro-batches.
    fully_shard(stage, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=False)
    return stage


def plain_parameters(stage: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, parameter, and the shape that it has in the plain network."""
    for name, parameter in stage.named_parameters():
        shape = tuple(parameter.shape)
        yield name, parameter, (2 * shape[0], *shape[2:]) if is_paired(name) else shape


def fill(stage: nn.Module, values: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Give every parameter its part of ``values(name, shape)``, the whole tensor of the plain network.

    torch's own random initialisation of cut tensors repeats itself on every shard on a CPU, silently.
    """
    for name, parameter, shape in plain_parameters(stage):
        full = values(name, shape)
        put(parameter, to_pairs(full) if is_paired(name) else full)


def gather(stage: nn.Module, pick: Callable[[Tensor], Tensor | None] = lambda p: p) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor, in the plain network's shape, of what ``pick`` takes of each parameter of this stage.

    A collective over the data and tensor axes, one tensor at a time.
    """
    for name, parameter in stage.named_parameters():
        chosen = pick(parameter)
        if chosen is not None:
            full = whole(chosen.detach())
            yield name, from_pairs(full) if is_paired(name) else full
