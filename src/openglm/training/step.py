"""One training step, in order: schedules, forward, backward, norm, judgement, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openglm.data.loader import GlobalBatch, MicroBatch, Rows, empty_micro_batch
from openglm.data.schedule import value_at
from openglm.infilling import NO_TARGET
from openglm.parallel.tensor import local
from openglm.training.model import TrainingModel
from openglm.training.optimizer import make_optimizer
from openglm.training.ranks import Ranks
from openglm.training.recipe import Recipe, learning_rate
from openglm.training.scaler import LossScaler
from openglm.training.stability import Edits, SpikeGuard

Sums = dict[str, tuple[float, int]]


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every process."""

    loss: float
    """Mean over the tokens that carry loss, in nats."""
    groups: Sums
    """"objective language" to (sum of losses in nats, tokens)."""
    sources: Sums
    """Name of the source to the same."""
    tokens: int
    targets: int
    gradient_norm: float
    """Before clipping."""
    norms: dict[str, float]
    """The gradient's norm by group of parameters, the embedding apart."""
    learning_rate: float
    loss_scale: float
    verdict: str = "step"
    """"step", "skip" or "rollback"."""
    why: str = ""
    updates: dict[str, float] = field(default_factory=dict)
    """Norm of the update by group, where it was asked for."""
    alarm: str = ""
    """What a person should look at, though nothing was done about it."""


class Trainer:
    """All that a step needs: the model, its optimizer, and the states of scaler and guard."""

    def __init__(self, model: TrainingModel, recipe: Recipe, ranks: Ranks, edits: Edits | None = None) -> None:
        self.model, self.recipe, self.ranks = model, recipe, ranks
        self.optimizer = make_optimizer(model, recipe.optimizer)
        self.scaler = LossScaler() if recipe.run.precision == "float16" else None
        self.guard = SpikeGuard(recipe.stability)
        self.edits = edits or Edits()

    def apply_schedules(self, samples: int) -> float:
        """Set everything that changes with the samples seen; returns the learning rate."""
        o, network = self.recipe.optimizer, self.model.network
        rate = learning_rate(self.recipe, samples, self.edits.rewarm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        network.input_gradient_factor = value_at(o.input_gradient_factor, samples) * self.edits.shrink
        network.output_gradient_factor = value_at(o.output_gradient_factor, samples)
        hidden, attention = value_at(o.hidden_dropout, samples), value_at(o.attention_dropout, samples)
        network.set_dropout(hidden, attention)
        if hidden or attention:
            # Masks are a function of the sample number, and of the process: none repeats another's.
            mesh = self.ranks.mesh
            stage = mesh["pipeline"].get_local_rank() if mesh is not None else 0
            place = self.ranks.data_rank * self.ranks.layout.pipeline + stage
            torch.manual_seed(((self.recipe.run.seed * 1_000_003 + samples) * 65_537 + place) % 2**64)
        return rate

    def step(self, batch: GlobalBatch, rows: Rows, *, measure_updates: bool = False) -> StepResult:
        """One update of the weights with a global batch, or none if it is skipped."""
        rate = self.apply_schedules(batch.first)
        scale = self.scaler.scale if self.scaler else 1.0
        tokens, targets = (int(n) for n in self.ranks.data_sum([batch.tokens, batch.targets]))
        micro_batches = list(batch.micro_batches)
        if self.ranks.mesh is not None:
            most = max(int(self.ranks.data_most(len(micro_batches))), self.ranks.layout.pipeline)
            window = self.recipe.objectives.window
            micro_batches += [empty_micro_batch(rows, window) for _ in range(most - len(micro_batches))]
        losses = self.model.forward_backward([micro.batch for micro in micro_batches], scale / max(targets, 1))
        groups, sources = self._report(micro_batches, losses)
        loss = sum(total for total, _ in groups.values()) / max(targets, 1)
        squares = self.model.norms()
        norm = _root(sum(squares.values())) / scale

        verdict, why = self.guard.judge(batch.first, loss, norm)
        updates: dict[str, float] = {}
        if verdict == "step":
            clip = self.recipe.optimizer.clip_norm
            factor = min(1.0, clip / (norm + 1e-6)) / scale
            if factor != 1.0:
                self.model.scale_gradients(factor)
            before = [local(p).clone() for p in self.model.weights().values()] if measure_updates else []
            self.optimizer.step()
            if measure_updates:
                updates = self._update_norms(before)
            self.model.publish()
        self.model.drop_gradients()
        alarm = ""
        if self.scaler:
            self.scaler.update(overflow=not math.isfinite(norm))
            if self.scaler.scale < scale and self.scaler.scale <= self.recipe.stability.alarm_scale:
                alarm = f"the loss scale fell to {self.scaler.scale:g}"
        return StepResult(
            loss=loss,
            groups=groups,
            sources=sources,
            tokens=tokens,
            targets=targets,
            gradient_norm=norm,
            norms={name: _root(square) / scale for name, square in squares.items()},
            learning_rate=rate,
            loss_scale=scale,
            verdict=verdict,
            why=why,
            updates=updates,
            alarm=alarm,
        )

    @torch.no_grad()
    def _update_norms(self, before: list[Tensor]) -> dict[str, float]:
        for parameter, old in zip(self.model.weights().values(), before, strict=True):
            if parameter.grad is not None:
                torch.sub(local(parameter.detach()), old, out=local(parameter.grad))
        return {name: _root(square) for name, square in self.model.norms().items()}

    def _report(self, micro_batches: list[MicroBatch], losses: list[Tensor]) -> tuple[Sums, Sums]:
        """Sums of losses by objective and by source, over all processes."""
        groups: Sums = {}
        sources: Sums = {}
        if self.model.reports:
            for micro, loss in zip(micro_batches, losses, strict=True):
                if not micro.samples:
                    continue
                owners = torch.from_numpy(micro.owners).flatten()
                has = (owners >= 0) & _carries(micro)
                sums = torch.zeros(len(micro.samples), dtype=torch.float64)
                sums.index_add_(0, owners[has], loss.detach().flatten().cpu().double()[has])
                counts = torch.bincount(owners[has], minlength=len(micro.samples)).tolist()
                for sample, total, count in zip(micro.samples, sums.tolist(), counts, strict=True):
                    _add(groups, f"{sample.objective} {sample.language}", total, count)
                    _add(sources, sample.source, total, count)
        all_groups, all_sources = {}, {}
        for one, other in self.ranks.gather((groups, sources)):
            for into, sums in ((all_groups, one), (all_sources, other)):
                for name, (total, count) in sums.items():
                    _add(into, name, total, count)
        return all_groups, all_sources

    def state(self) -> dict[str, object]:
        """Plain values of scaler and guard for a snapshot."""
        return {"guard": self.guard.state(), "scaler": self.scaler.state() if self.scaler else None}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take back what ``state`` gave."""
        if state.get("guard"):
            self.guard.restore(state["guard"])  # pyright: ignore[reportArgumentType]
        if self.scaler and state.get("scaler"):
            self.scaler = LossScaler(**state["scaler"])  # pyright: ignore[reportCallIssue]


def _carries(micro: MicroBatch) -> Tensor:
    assert micro.batch.targets is not None
    return (micro.batch.targets != NO_TARGET).flatten().cpu()


def _add(sums: Sums, name: str, total: float, count: int) -> None:
    before = sums.get(name, (0.0, 0))
    sums[name] = (before[0] + total, before[1] + count)


def _root(square: float) -> float:
    """A square root that lets infinity and NaN through."""
    return math.sqrt(square) if square >= 0 else square
