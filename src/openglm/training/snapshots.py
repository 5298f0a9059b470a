"""Snapshots: the state of a run, to resume it. Whole or absent, with checksums; the newest that verifies is taken.

    SNAPSHOT/weights.safetensors     float32 master weights
    SNAPSHOT/optimizer.safetensors   both moments and the step count of each weight
    SNAPSHOT/state.json              samples, tokens and seconds so far, the recipe, and SHA-256 of the two files

The random state is not stored: every sample is a pure function of (seed, number).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openglm.errors import CheckpointError, StorageError
from openglm.storage import atomic_folder, remove, sha256
from openglm.training.step import MasterWeights

_NAME = re.compile(r"samples-(\d{10})")


@dataclass
class Progress:
    """How far a run has come."""

    samples: int = 0
    steps: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


def save_snapshot(
    folder: Path,
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    recipe: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/samples-NNNNNNNNNN`` atomically, then remove all but the newest ``keep``."""
    target = folder / f"samples-{progress.samples:010d}"
    with atomic_folder(target, replace=True) as temporary:
        save_file(
            {name: p.detach().cpu() for name, p in zip(weights.names, weights.master, strict=True)},
            temporary / "weights.safetensors",
        )
        moments: dict[str, Tensor] = {}
        for name, parameter in zip(weights.names, weights.master, strict=True):
            for key, value in optimizer.state[parameter].items():
                moments[f"{name}/{key}"] = value.detach().cpu()
        save_file(moments, temporary / "optimizer.safetensors")
        sums = {name: sha256(temporary / name) for name in ("weights.safetensors", "optimizer.safetensors")}
        state = {"progress": asdict(progress), "recipe": recipe, "sha256": sums}
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))[:-keep]:
        remove(old)
    return target


def newest_snapshot(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest snapshot whose checksums hold, and its state; damaged ones are passed over. None if there is none."""
    if not folder.is_dir():
        return None
    for path in sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if all(sha256(path / name) == digest for name, digest in state["sha256"].items()):
                return path, state
        except (OSError, ValueError, KeyError, StorageError):
            continue
    return None


def load_snapshot(path: Path, weights: MasterWeights, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Progress:
    """Put a snapshot's weights and moments in place. Raises ``CheckpointError`` if it is of another network."""
    try:
        tensors, moments = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the snapshot `{path}`: {error}", path=path) from error
    with torch.no_grad():
        for name, parameter in zip(weights.names, weights.master, strict=True):
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the snapshot `{path}` is of another network: `{name}` does not fit",
                    hint="give another --out, or --fresh to start anew",
                    path=path,
                    key=name,
                )
            parameter.copy_(tensors[name])
            keys = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" else value.float() for key, value in keys.items()
            }
    weights.publish()
    return Progress(**state["progress"])
