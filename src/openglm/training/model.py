"""A network in training: one process with a working copy, or a part of a parallel layout, behind one interface.

On one process the network computes in a low-precision copy of float32 master weights (the optimizer's), which is faster
than autocast, because nothing is cast twice; and only rows that carry loss meet the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.infilling import NO_TARGET, Batch
from openglm.kernels.compiled import compile_layers
from openglm.kernels.onednn import use_onednn
from openglm.models.glm130b import GLM130B
from openglm.parallel.execution import Execution
from openglm.parallel.execution import MicroBatch as Tensors
from openglm.parallel.stage import gather, recompute_layers
from openglm.parallel.tensor import local
from openglm.training.stopwatch import Stopwatch


class TrainingModel(Protocol):
    """What the step, the snapshots and the run need."""

    network: GLM130B
    """Computes; its modes, factors and dropout are set from outside."""
    reports: bool
    """True on the one process of each data rank that reports losses: the first tensor rank of the last stage."""

    def weights(self) -> dict[str, nn.Parameter]:
        """Name to float32 master weight of this process."""
        ...

    def forward_backward(self, batches: Sequence[Batch], factor: float) -> list[Tensor]:
        """Add the gradient of factor x (sum of all losses) to the masters; losses float32 ``[b, s]`` of each batch."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Losses float32 ``[b, s]`` of a batch, without gradients, on every process; all must hand in the same one."""
        ...

    def norms(self) -> dict[str, float]:
        """Squared norm of the whole gradient by group of parameters, the same on every process."""
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient by a number."""
        ...

    def publish(self) -> None:
        """Let the network compute with the updated masters."""
        ...

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        ...

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every weight, one at a time; a collective."""
        ...


def group_of(name: str) -> str:
    """The group of a parameter for norms: "embedding", "layers 0-9" by tens, "norms"."""
    if name.startswith("word_embeddings"):
        return "embedding"
    if name.startswith("final_layernorm"):
        return "final norm"
    ten = int(name.split(".")[1]) // 10 * 10
    return f"layers {ten}-{ten + 9}"


class MasterWeights:
    """One process: float32 weights for the optimizer, beside a working copy in ``precision`` that the network uses.

    Turns the network's parameters into that copy; in float32 both are the same tensors. ``compile``: as ``run.compile``;
    ``recompute``: as ``parallel.recompute``.
    """

    reports = True

    def __init__(self, network: GLM130B, precision: str, *, compile: bool = False, recompute: bool = False) -> None:
        self.network = network
        self._cross_entropy = cross_entropy
        if recompute:
            recompute_layers(network.layers.values())
        if compile:
            compile_layers(network.layers.values())
            self._cross_entropy = torch.compile(cross_entropy, dynamic=True)
        elif precision == "float32":
            use_onednn(network)
        self.names = [name for name, _ in network.named_parameters()]
        self.same = precision == "float32"
        full = [parameter.detach().float() for parameter in network.parameters()]
        network.to(getattr(torch, precision))  # gives the parameters other memory, and leaves theirs to ``full``
        self.working = list(network.parameters())
        self.master = self.working if self.same else [nn.Parameter(parameter) for parameter in full]

    def weights(self) -> dict[str, nn.Parameter]:
        """Name to float32 master weight."""
        return dict(zip(self.names, self.master, strict=True))

    def forward_backward(self, batches: Sequence[Batch], factor: float) -> list[Tensor]:
        """As ``TrainingModel``."""
        device = self.master[0].device
        found = []
        for batch in batches:
            losses, rows = token_losses(self.network, batch, device, self._cross_entropy)
            (losses.sum() * factor).backward()
            found.append(_in_place(losses.detach(), rows, batch))
        if not self.same:
            for master, working in zip(self.master, self.working, strict=True):
                master.grad = None if working.grad is None else working.grad.float()
                working.grad = None
        return found

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """As ``TrainingModel``."""
        return _in_place(*token_losses(self.network, batch, self.master[0].device), batch)

    def norms(self) -> dict[str, float]:
        """As ``TrainingModel``."""
        squares = torch._foreach_norm([_gradient(p) for p in self.master])  # pyright: ignore[reportPrivateImportUsage]
        groups: dict[str, float] = {}
        for name, norm in zip(self.names, torch.stack(squares).double().square().tolist(), strict=True):
            groups[group_of(name)] = groups.get(group_of(name), 0.0) + norm
        return groups

    def scale_gradients(self, factor: float) -> None:
        """As ``TrainingModel``."""
        torch._foreach_mul_([_gradient(p) for p in self.master], factor)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master weights into the working copy."""
        if not self.same:
            torch._foreach_copy_(tuple(self.working), tuple(self.master))  # pyright: ignore[reportPrivateImportUsage]

    def drop_gradients(self) -> None:
        """As ``TrainingModel``."""
        for parameter in self.master:
            parameter.grad = None

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As ``TrainingModel``."""
        return iter((name, p.detach()) for name, p in zip(self.names, self.master, strict=True))


def _in_place(losses: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    """Losses ``[n]`` of some rows as ``[b, s]``."""
    assert batch.targets is not None
    every = losses.new_zeros(batch.targets.numel())
    every[rows.to(losses.device)] = losses
    return every.view(batch.targets.shape)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # a batch without a target
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses in nats, float32 ``[n]``, of logits ``[n, vocabulary]`` and targets int64 ``[n]``; softmax in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def token_losses(
    network: GLM130B,
    batch: Batch,
    device: torch.device | str,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Losses in nats, float32 ``[n]``, of the tokens that carry loss, and their rows in the flattened batch, int64 ``[n]``.

    ``loss``: ``cross_entropy`` or its compiled form.
    """
    assert batch.targets is not None
    targets = batch.targets.flatten()
    rows = (targets != NO_TARGET).nonzero().squeeze(1)
    logits = network(
        batch.tokens.to(device), batch.positions.to(device), batch.mask.to(device), rows=rows.to(device)
    )  # [n, vocabulary]
    return loss(logits, targets[rows].to(device)), rows


class ShardedModel:
    """One process of several: its part of the network on a parallel layout."""

    def __init__(self, execution: Execution, stopwatch: Stopwatch) -> None:
        self.execution, self._stopwatch = execution, stopwatch
        self.network: GLM130B = execution.stage
        layers, device = execution.stage.layers.values(), execution.mesh.device_type
        stopwatch.follow(layers, cut=execution.layout.tensor > 1, device=device)
        # Asked for once: while weights are gathered, the modules hold other tensors under these names.
        self._weights = dict(self.network.named_parameters())
        self.reports = execution.stage.last and execution.mesh["tensor"].get_local_rank() == 0

    def weights(self) -> dict[str, nn.Parameter]:
        """Name to this process's part of the float32 master weight (a DTensor)."""
        return dict(self._weights)

    def forward_backward(self, batches: Sequence[Batch], factor: float) -> list[Tensor]:
        """As ``TrainingModel``; losses on the last stage only."""
        tensors = [self._tensors(batch) for batch in batches]
        with self._stopwatch.together():
            return self.execution.forward_backward(tensors, factor)

    def _tensors(self, batch: Batch) -> Tensors:
        assert batch.targets is not None
        device = local(next(self.network.parameters())).device
        return Tensors(*(t.to(device) for t in (batch.tokens, batch.positions, batch.mask, batch.targets)))

    def losses(self, batch: Batch) -> Tensor:
        """As ``TrainingModel``."""
        return self.execution.losses(self._tensors(batch))

    def norms(self) -> dict[str, float]:
        """As ``TrainingModel``; a collective."""
        groups = {group_of(f"layers.{n}"): 0.0 for n in range(self.network.config.num_layers)}
        groups |= {"embedding": 0.0, "final norm": 0.0}
        with self._stopwatch.together():
            return self.execution.squared_norms(groups, group_of)

    def scale_gradients(self, factor: float) -> None:
        """As ``TrainingModel``."""
        self.execution.scale_gradients(factor)

    def publish(self) -> None:
        """Nothing to do: the weights are gathered and rounded anew in every forward pass."""

    def drop_gradients(self) -> None:
        """As ``TrainingModel``."""
        for parameter in self._weights.values():
            parameter.grad = None

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As ``TrainingModel``: those of this stage."""
        return gather(self.network)
