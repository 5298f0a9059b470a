"""One training step, in order: rate, forward, backward, clip, update.

On a CPU the network computes in a bfloat16 copy of float32 master weights (the optimizer's), which is faster than
autocast, because nothing is cast twice; and only rows that carry loss go through the product with the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.data.loader import GlobalBatch
from openglm.infilling import NO_TARGET
from openglm.models.glm130b import GLM130B
from openglm.training.recipe import Recipe, learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    loss: float
    """Mean over the tokens that carry loss, in nats."""
    groups: dict[str, tuple[float, int]]
    """"objective language" to (sum of losses in nats, tokens)."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float


class MasterWeights:
    """float32 weights for the optimizer, beside a working copy in ``precision`` that the network computes with.

    Turns the network's parameters into that copy; in float32 both are the same tensors.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        self.same = precision == "float32"
        full = [parameter.detach().float().clone() for parameter in network.parameters()]
        network.to(getattr(torch, precision))
        self.working = list(network.parameters())
        self.master = self.working if self.same else [nn.Parameter(parameter) for parameter in full]

    def collect_gradients(self) -> None:
        """Move the working copy's gradients to the master weights, in float32."""
        if not self.same:
            for master, working in zip(self.master, self.working, strict=True):
                master.grad = None if working.grad is None else working.grad.float()
                working.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master weights into the working copy."""
        if not self.same:
            for working, master in zip(self.working, self.master, strict=True):
                working.copy_(master)


def make_optimizer(weights: MasterWeights, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (SPEC 9.1)."""
    o = recipe.optimizer
    matrices = [p for p in weights.master if p.dim() > 1]
    vectors = [p for p in weights.master if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=o.betas, eps=o.epsilon, fused=True)


def token_losses(network: GLM130B, batch, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Losses in nats, float32 ``[n]``, of the tokens that carry loss, and their rows in the flattened batch, int64 ``[n]``."""
    targets = batch.targets.flatten()
    rows = (targets != NO_TARGET).nonzero().squeeze(1)
    logits = network(
        batch.tokens.to(device), batch.positions.to(device), batch.mask.to(device), rows=rows.to(device)
    )  # [n, vocabulary]
    return F.cross_entropy(logits.float(), targets[rows].to(device), reduction="none"), rows


def train_step(
    network: GLM130B,
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    recipe: Recipe,
) -> StepResult:
    """One update of the weights with a global batch."""
    rate = learning_rate(recipe, batch.first)
    for group in optimizer.param_groups:
        group["lr"] = rate
    groups: dict[str, tuple[float, int]] = {}
    total = 0.0
    for micro in batch.micro_batches:
        losses, rows = token_losses(network, micro.batch, recipe.run.device)
        # Every target token of the global batch weighs the same, however the batch is cut.
        (losses.sum() / batch.targets).backward()
        owner = rows // micro.batch.tokens.shape[1]
        sums = torch.zeros(len(micro.samples)).index_add_(0, owner, losses.detach().float().cpu()).tolist()
        counts = torch.bincount(owner, minlength=len(micro.samples)).tolist()
        for sample, loss, count in zip(micro.samples, sums, counts, strict=True):
            name = f"{sample.objective} {sample.language}"
            before = groups.get(name, (0.0, 0))
            groups[name] = (before[0] + loss, before[1] + count)
            total += loss
    weights.collect_gradients()
    norm = torch.nn.utils.clip_grad_norm_(weights.master, recipe.optimizer.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weights.publish()
    return StepResult(total / max(batch.targets, 1), groups, float(norm), rate)
