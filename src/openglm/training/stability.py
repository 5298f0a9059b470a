"""What is done about spikes without a hand (SPEC 9.2): skip a step, roll back, leave out samples, shrink, re-warm.

A collapse follows a spike of the gradient norm by a few steps, and every number that decides here is the same on every
process, so all decide alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openglm.errors import CheckpointError
from openglm.storage import atomic_write
from openglm.training.recipe import StabilitySection


@dataclass
class Edits:
    """What interventions have changed for the rest of the run. Kept beside the snapshots, for a roll-back loads an old one."""

    rollbacks: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """[from, to) ranges of samples that are left out."""
    shrink: float = 1.0
    """Factor on the input gradient factor."""
    rewarm: list[tuple[int, int]] = field(default_factory=list)
    """(sample, length): the rate climbs anew."""

    def position(self, samples: int, by_hand: Sequence[tuple[int, int]] = ()) -> int:
        """The next sample at or behind ``samples`` that is not left out, here or by the recipe's own ranges."""
        for start, end in sorted([*self.skipped, *by_hand]):
            if start <= samples < end:
                samples = end
        return samples

    def room(self, samples: int, by_hand: Sequence[tuple[int, int]] = ()) -> float:
        """How many samples follow from ``samples`` on before the next that is left out; infinite if there is none."""
        return min((start for start, _ in [*self.skipped, *by_hand] if start >= samples), default=math.inf) - samples

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        with atomic_write(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Edits:
        """What ``save`` wrote; nothing if there is no such file. Raises ``CheckpointError`` for anything else."""
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            made = cls(**values)
            made.skipped, made.rewarm = ([(int(a), int(b)) for a, b in pairs] for pairs in (made.skipped, made.rewarm))
            if not (isinstance(made.rollbacks, int) and 0 <= made.shrink < math.inf):
                raise ValueError(values)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"`{path}` is not what a run wrote there",
                hint="put a copy of it back, or start anew with --fresh",
                path=path,
            ) from error
        return made


class SpikeGuard:
    """Judges each step by its loss and gradient norm against the last ones."""

    #: Steps to have seen before anything but a number that is not finite is judged.
    LEAST = 8

    def __init__(self, policy: StabilitySection) -> None:
        self.policy = policy
        self._losses: deque[float] = deque(maxlen=policy.window)
        self._norms: deque[float] = deque(maxlen=policy.window)
        self._skips = 0
        self._spiking = 0
        self.suspect: int | None = None
        """Samples at which the present trouble began."""

    def judge(self, samples: int, loss: float, norm: float) -> tuple[str, str]:
        """("step" | "skip" | "rollback", why) for the step that began at ``samples``, before the weights are touched."""
        p = self.policy
        why = ""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            why = "the gradient is not finite" if math.isfinite(loss) else "the loss is not finite"
        elif p.skip_norm and len(self._norms) >= self.LEAST and norm > p.skip_norm * statistics.median(self._norms):
            why = f"gradient norm {norm:.3g}, the median is {statistics.median(self._norms):.3g}"
        if why:
            self._trouble(samples)
            self._skips += 1
            return ("rollback" if self._skips > p.most_skips else "skip"), why
        self._skips = 0
        if p.spike_loss and len(self._losses) >= self.LEAST and loss > statistics.median(self._losses) + p.spike_loss:
            self._trouble(samples)
            self._spiking += 1
            why = f"loss {loss:.3f}, the median is {statistics.median(self._losses):.3f}"
            return ("rollback" if self._spiking >= p.patience else "step"), why
        self._spiking = 0
        self.suspect = None
        self._losses.append(loss)
        self._norms.append(norm)
        return "step", ""

    def _trouble(self, samples: int) -> None:
        if self.suspect is None:
            self.suspect = samples

    def state(self) -> dict[str, Any]:
        """Plain values for a snapshot: a resumed run must judge as if it had not stopped."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skips": self._skips,
            "spiking": self._spiking,
            "suspect": self.suspect,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self._losses = deque(state["losses"], maxlen=self.policy.window)
        self._norms = deque(state["norms"], maxlen=self.policy.window)
        self._skips, self._spiking, self.suspect = state["skips"], state["spiking"], state["suspect"]
