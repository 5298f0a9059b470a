"""Optimizers of a run: AdamW, or Muon for the layers' matrices beside AdamW for all else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openglm.errors import ConfigError
from openglm.training.model import MasterWeights, TrainingModel
from openglm.training.recipe import OptimizerSection


class MuonBesideAdamW:
    """Two optimizers that step together; both take the same learning rate.

    Muon moves a matrix by its orthogonalized momentum, scaled so that the root mean square of an update is AdamW's.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._each = (muon, adamw)
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """Of all parameters."""
        return {
            parameter: own.state[parameter] for own in self._each for group in own.param_groups for parameter in group["params"]
        }

    def step(self) -> None:
        """One update of all weights."""
        for own in self._each:
            own.step()


Optimizer = torch.optim.AdamW | MuonBesideAdamW


def make_optimizer(model: TrainingModel, section: OptimizerSection) -> Optimizer:
    """Weight decay on matrices only (SPEC 9.1). Raises ``ConfigError`` for Muon over several processes."""
    weights = model.weights()
    vectors = [p for name, p in weights.items() if is_vector(name)]
    hidden = [p for name, p in weights.items() if not is_vector(name) and name.startswith("layers.")]
    others = [p for name, p in weights.items() if not is_vector(name) and not name.startswith("layers.")]

    def adamw(matrices: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, fused=True)

    if section.name == "adamw":
        return adamw([*others, *hidden])
    if not isinstance(model, MasterWeights):
        raise ConfigError(
            'optimizer.name = "muon" works on whole matrices, so in one process only', hint='use "adamw"', key="optimizer.name"
        )
    muon = torch.optim.Muon(hidden, lr=section.learning_rate, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonBesideAdamW(muon, adamw(others))


def is_vector(name: str) -> bool:
    """True for biases and norms. By name, for a paired bias has two dimensions."""
    return name.endswith(".bias") or "layernorm" in name


def moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter, the tensors themselves; zeros before its first step."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, MuonBesideAdamW) and any(parameter is p for p in optimizer.param_groups[0]["params"]):
        names, counter = ("momentum_buffer",), None
    else:
        names, counter = ("exp_avg", "exp_avg_sq"), "step"
    if counter and counter not in state:
        state[counter] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(parameter)
    return {name: state[name].detach() for name in ((counter, *names) if counter else names)}
