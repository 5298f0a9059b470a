"""What a run leaves to be read: ``metrics.jsonl``, a row every few steps that tells of each of them, and ``events.jsonl``,
what was done to it."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openglm.parallel.layout import ParallelLayout
from openglm.storage import Journal, atomic_write
from openglm.training.snapshots import Progress
from openglm.training.step import StepResult, Sums
from openglm.training.trackers import Trackers

#: A process is called slow when its own work takes so many times the median of those that have the same to do.
STRAGGLER = 1.3


class Recorder:
    """Writes both files; on other processes than the lead it does nothing."""

    def __init__(self, out: Path, lead: bool, *, from_samples: int = 0, trackers: Trackers | None = None) -> None:
        self.out, self._lead, self._trackers = out, lead, trackers
        self._steps: dict[str, list[float]] = {}
        self._metrics: Journal | None = None
        if lead:
            self._metrics = self._open(from_samples)

    def _open(self, samples: int) -> Journal:
        """The journal of rows, without those behind ``samples``."""
        cut_after(self.out / "metrics.jsonl", samples)
        metrics = Journal(self.out / "metrics.jsonl")
        if self._trackers is not None:
            self._trackers.rewind(metrics.entries[-1]["step"] if metrics.entries else 0)
        return metrics

    def step(self, progress: Progress, result: StepResult, seconds: float) -> None:
        """Keep the few numbers of a step for the next row: a write to the disk for each would cost more than a small step."""
        if self._metrics is None:
            return
        values = {
            "samples": progress.samples,
            "loss": round(result.loss, 5),
            "gradient_norm": _short(result.gradient_norm),
            "embedding_norm": _short(result.norms["embedding"]),
            "learning_rate": _short(result.learning_rate),
            "loss_scale": result.loss_scale,
            "seconds": round(seconds, 4),
        }
        for key, value in values.items():
            self._steps.setdefault(key, []).append(value)

    def row(self, progress: Progress, result: StepResult, speed: float, times: list[float], slow: list[int]) -> None:
        """One row of metrics, with the steps since the last one.

        ``times``: seconds of own work a step, by process; ``slow``: those that are ``stragglers``.
        """
        if self._metrics is None:
            return
        row: dict[str, Any] = {
            "step": progress.steps,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "loss": round(result.loss, 5),
            "losses": _means(result.groups),
            "sources": _means(result.sources),
            "gradient_norm": _short(result.gradient_norm),
            "gradient_norms": {name: _short(value) for name, value in result.norms.items()},
            "update_norms": {name: _short(value) for name, value in result.updates.items()},
            "learning_rate": result.learning_rate,
            "loss_scale": result.loss_scale,
            "tokens_per_second": round(speed, 1),
            "bits_per_byte": {name: round(value, 4) for name, value in progress.validation.items()},
        }
        if len(times) > 1:
            row["rank_seconds"] = [round(value, 4) for value in times]
            if slow:
                row["stragglers"] = slow
        if len(self._steps.get("samples", ())) > 1:  # of one step the row tells all
            row["steps"] = self._steps
        self._steps = {}
        self._metrics.append(row)
        if self._trackers is not None:
            self._trackers.row(row)

    def rewind(self, samples: int) -> None:
        """Drop rows behind ``samples``, after a roll-back; the events keep the story."""
        self._steps = {}
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = self._open(samples)

    def note(self, kind: str, samples: int, **details: Any) -> None:
        """One event, appended to ``events.jsonl``."""
        if not self._lead:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        event = {"time": now, "event": kind, "samples": samples, **details}
        with Journal(self.out / "events.jsonl") as events:
            events.append(event)
        if self._trackers is not None:
            self._trackers.event(event)

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()


def stragglers(times: Sequence[float], layout: ParallelLayout, num_layers: int) -> list[int]:
    """Ranks whose own work, in seconds by rank, takes clearly longer than the median of the same pipeline stage.

    Where each stage is one process, all are compared, by seconds a layer.
    """
    each = layout.data * layout.tensor
    found = []
    if each == 1:
        times = [time / len(layers) for time, layers in zip(times, layout.stage_layers(num_layers), strict=True)]
        each = len(times)
    for start in range(0, len(times), each):
        stage = times[start : start + each]
        middle = statistics.median_low(stage)
        found += [start + place for place, time in enumerate(stage) if time > STRAGGLER * middle]
    return found


def cut_after(path: Path, samples: int) -> None:
    """Drop rows behind a snapshot: the run makes them anew."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if json.loads(line)["samples"] > samples:
                break
        except (ValueError, KeyError, TypeError):
            if line is lines[-1] and not line.endswith("\n"):
                break  # torn by a kill
            return  # not ours: the journal will say
        kept.append(line)
    if len(kept) < len(lines):
        with atomic_write(path, "w", encoding="utf-8") as file:
            file.writelines(kept)


def _means(sums: Sums) -> dict[str, float]:
    return {name: round(total / max(count, 1), 4) for name, (total, count) in sorted(sums.items())}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
