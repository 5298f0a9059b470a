"""Forward and backward of one global batch on a layout, the tied matrix, and the norm over all axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from openglm.errors import ConfigError
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.stage import Stage
from openglm.parallel.tensor import local


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one micro-batch: tokens, positions and targets int64 ``[b, s]``, mask bool ``[b, s, s]``."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor


@dataclass
class Execution:
    """Runs a stage over micro-batches; ``mesh`` and ``layout`` are those of ``parallelize``."""

    stage: Stage
    layout: ParallelLayout
    mesh: DeviceMesh
    dtype: torch.dtype = torch.float32
    """What the stage computes in."""
    timeout: timedelta | None = None
    """Until a collective of its own fails; None = torch's."""
    _schedules: dict[tuple[int, ...], Schedule1F1B] = field(default_factory=dict)
    _ends: Any = None

    def __post_init__(self) -> None:
        if self.layout.pipeline > 1:
            # Every process makes every group, in the same order.
            ranks = self.mesh.mesh  # [pipeline, data, tensor]
            for data in range(self.layout.data):
                for tensor in range(self.layout.tensor):
                    ends = [int(ranks[0, data, tensor]), int(ranks[-1, data, tensor])]
                    group = dist.new_group(ends, timeout=self.timeout)
                    if dist.get_rank() in ends:
                        self._ends = group

    def forward_backward(self, micro_batches: Sequence[MicroBatch], factor: float) -> list[Tensor]:
        """Add the gradient of ``factor`` x (sum of all losses of all data ranks) to the parameters.

        Every rank of a pipeline and of a tensor group must hand in the same micro-batches, and every data rank equally
        many; with a pipeline all must have one shape. Returns the losses float32 ``[b, s]`` of each micro-batch on the
        last stage, nothing elsewhere.
        """
        factor *= self.layout.data  # sharded data parallelism averages over the data ranks
        with loss_parallel() if self.layout.tensor > 1 else contextlib.nullcontext():
            if self.layout.pipeline > 1:
                losses = self._pipeline(micro_batches, factor)
                self._add_ends()
                return losses
            losses = []
            for number, micro in enumerate(micro_batches, start=1):
                self.stage.set_requires_gradient_sync(number == len(micro_batches))  # pyright: ignore[reportCallIssue]
                self.stage.set_is_last_backward(number == len(micro_batches))  # pyright: ignore[reportCallIssue]
                loss = self.stage(micro.tokens, micro.positions, micro.mask, micro.targets)
                (loss.sum() * factor).backward()
                losses.append(loss.detach())
            return losses

    def _pipeline(self, micro_batches: Sequence[MicroBatch], factor: float) -> list[Tensor]:
        shape = micro_batches[0].tokens.shape
        if any(micro.tokens.shape != shape for micro in micro_batches):
            raise ConfigError("all micro-batches of a pipeline must have one shape", key="pipeline")
        if len(micro_batches) < self.layout.pipeline:
            raise ConfigError(
                f"{len(micro_batches)} micro-batches are too few for {self.layout.pipeline} pipeline stages",
                hint="use a larger batch or smaller micro-batches; four times the stages keeps the bubble small",
                key="pipeline",
            )
        collected: list[Tensor] = []

        def loss(output: Tensor, _: Tensor) -> Tensor:
            collected.append(output.detach())
            return output.sum() * factor

        # Shapes are fixed at a schedule's first step, so each shape has a schedule of its own.
        key = (len(micro_batches), *shape)
        if key not in self._schedules:
            group = self.mesh.get_group("pipeline")
            rank = self.mesh["pipeline"].get_local_rank()
            stage = PipelineStage(self.stage, rank, self.layout.pipeline, local_device(self.stage), group=group)
            # A mean over micro-batches would be another loss than the whole batch's.
            self._schedules[key] = Schedule1F1B(stage, len(micro_batches), loss_fn=loss, scale_grads=False)
        schedule = self._schedules[key]
        schedule._loss_fn = loss  # the factor changes from step to step
        tokens, positions, mask, targets = (
            torch.cat([getattr(micro, name) for micro in micro_batches]) for name in ("tokens", "positions", "mask", "targets")
        )
        arguments: dict[str, Any] = {"positions": positions, "mask": mask, "targets": targets}
        if self.stage.first:
            schedule.step(tokens, **arguments)
        elif self.stage.last:
            schedule.step(target=targets, losses=[], **arguments)
        else:
            schedule.step(**arguments)
        # Before its first step a schedule infers shapes with a micro-batch of garbage.
        return collected[-len(micro_batches) :]

    @torch.no_grad()
    def losses(self, micro: MicroBatch) -> Tensor:
        """Losses float32 ``[b, s]`` of one batch on every rank, stage after stage. All ranks hand in the same one."""
        stage, group = self.stage, self.mesh.get_group("pipeline")
        ranks = dist.get_process_group_ranks(group)
        place = self.mesh["pipeline"].get_local_rank()
        x = micro.tokens
        if not stage.first:
            shape = (*micro.tokens.shape, stage.config.hidden_size)
            x = torch.empty(shape, dtype=self.dtype, device=micro.tokens.device)
            dist.recv(x, ranks[place - 1], group=group)
        with loss_parallel() if self.layout.tensor > 1 else contextlib.nullcontext():
            x = stage(x, micro.positions, micro.mask, micro.targets)
        if not stage.last:
            dist.send(x.contiguous(), ranks[place + 1], group=group)
            x = torch.empty(micro.tokens.shape, dtype=torch.float32, device=micro.tokens.device)
        if len(ranks) > 1:
            dist.broadcast(x, ranks[-1], group=group)
        for module in stage.modules():  # without a backward pass nothing else would free the gathered weights
            if isinstance(module, FSDPModule):
                module.reshard()
        return x

    def _add_ends(self) -> None:
        """The tied matrix lies on the first and the last stage: its gradient is the sum of both."""
        if self._ends is not None:
            embeddings = self.stage.word_embeddings
            assert embeddings is not None
            gradient = embeddings.weight.grad
            assert gradient is not None
            dist.all_reduce(local(gradient), group=self._ends)

    def squared_norms(self, groups: Mapping[str, float], group_of: Callable[[str], str]) -> dict[str, float]:
        """Squared norm of the whole gradient over all axes, by group; not finite if any part on any rank is not.

        ``groups``: every group there is, in one order on all ranks, with the value to begin with.
        """
        sizes = {"data": self.layout.data, "tensor": self.layout.tensor}
        totals = {name: torch.tensor(value, dtype=torch.float64) for name, value in groups.items()}
        for name, parameter in self.stage.named_parameters():
            if parameter.grad is None or (name.startswith("word_embeddings") and not self.stage.first):
                continue  # the second copy of the tied matrix
            gradient = parameter.grad
            names = (gradient.device_mesh.mesh_dim_names or ()) if isinstance(gradient, DTensor) else ()
            copies = 1
            for axis, size in sizes.items():  # ranks that hold the same numbers count once
                cut = axis in names and not gradient.placements[names.index(axis)].is_replicate()  # pyright: ignore[reportAttributeAccessIssue]
                copies *= 1 if cut else size
            totals[group_of(name)] = totals[group_of(name)] + (local(gradient).double().square().sum() / copies).cpu()
        stacked = torch.stack(list(totals.values())).to(local_device(self.stage))
        dist.all_reduce(stacked)
        return dict(zip(totals, stacked.tolist(), strict=True))

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient by a number."""
        for parameter in self.stage.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)


def local_device(stage: Stage) -> torch.device:
    """Where a stage's weights lie."""
    return local(next(stage.parameters())).device
