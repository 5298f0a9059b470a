"""What a run left in ``metrics.jsonl`` and ``events.jsonl``, as numbers ready to draw. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openglm.errors import InputError
from openglm.storage import storage_error

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
#: Events by gravity, and their names in a report. A "step" with a reason is a spike that was only noticed.
KINDS = {
    "rollback": "roll-back",
    "skip": "skipped step",
    "alarm": "alarm",
    "step": "loss spike",
    "left_out": "left out by hand",
    "resume": "resumed",
}


@dataclass(frozen=True)
class Intervention:
    """Something that was done to a run, or that it noticed."""

    kind: str
    """A key of ``KINDS``, or whatever else the file says."""
    samples: int
    text: str
    time: str = ""
    """ISO 8601."""
    left_out: tuple[int, int] | None = None
    """[from, to) samples that a roll-back or the recipe jumps over."""

    @property
    def name(self) -> str:
        """How it is called in a report."""
        return KINDS.get(self.kind, self.kind)


@dataclass(frozen=True)
class RunRecord:
    """The rows of a run, in order and each step once, and its interventions."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    interventions: list[Intervention] = field(default_factory=list)

    @property
    def samples(self) -> np.ndarray:
        """Samples at each row, int64 ``[rows]``."""
        return np.array([row["samples"] for row in self.rows], dtype=np.int64)

    def column(self, key: str) -> np.ndarray:
        """A number of each row, float64 ``[rows]``; NaN where it is missing."""
        return np.array([_number(row.get(key)) for row in self.rows], dtype=np.float64)

    def each(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Samples and a number of every step, float64 ``[steps]``; of a row that does not tell its steps, the row's own."""
        pairs: list[tuple[Any, Any]] = []
        for row in self.rows:
            steps = row.get("steps")
            samples, values = (steps.get("samples"), steps.get(key)) if isinstance(steps, Mapping) else (None, None)
            if isinstance(samples, list) and isinstance(values, list) and len(samples) == len(values) > 0:
                pairs += zip(samples, values, strict=True)
            else:
                pairs.append((row["samples"], row.get(key)))
        made = np.array([(_number(samples), _number(value)) for samples, value in pairs], dtype=np.float64)
        return made[:, 0], made[:, 1]

    def table(self, key: str) -> dict[str, np.ndarray]:
        """Names to columns for an entry that maps names to numbers; the most frequent name first."""
        columns: dict[str, np.ndarray] = {}
        for place, row in enumerate(self.rows):
            values = row.get(key)
            for name, value in values.items() if isinstance(values, Mapping) else ():
                columns.setdefault(str(name), np.full(len(self.rows), np.nan))[place] = _number(value)
        return dict(sorted(columns.items(), key=lambda item: (-int(np.isfinite(item[1]).sum()), item[0])))

    def validations(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Language to (places of rows, bits per byte), one for each validation: rows between two repeat the last."""
        points: dict[str, list[tuple[int, float]]] = {}
        before: Any = None
        for place, row in enumerate(self.rows):
            values = row.get("bits_per_byte")
            if isinstance(values, Mapping) and values != before:
                for language, value in values.items():
                    points.setdefault(str(language), []).append((place, _number(value)))
            before = values
        return {name: (np.array([p for p, _ in found]), np.array([v for _, v in found])) for name, found in points.items()}

    def counts(self) -> dict[str, int]:
        """Kinds of interventions to how many."""
        found: dict[str, int] = {}
        for one in self.interventions:
            found[one.kind] = found.get(one.kind, 0) + 1
        return found


def read_run(folder: str | Path, name: str | None = None) -> RunRecord:
    """Read a run's folder.

    A run that went back to a snapshot without cutting its metrics repeats steps: a row takes the place of all earlier
    ones of its step or later. A torn last line is left out. Raises ``InputError`` if there is nothing to read, or a line
    is not what a run writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"the run `{folder}` {wrong}", hint="give the folder that `glm train --out` names", path=folder)
    path = folder / METRICS
    if not path.is_file():
        raise InputError(f"`{folder}` holds no {METRICS}", hint="give the folder that `glm train --out` names", path=path)
    rows: list[dict[str, Any]] = []
    for number, row in _lines(path):
        step = row.get("step")
        if not (_is_count(step) and _is_count(row.get("samples"))):
            raise InputError(f"`{path}` line {number} has no step and samples, so it is not a row of metrics", path=path)
        while rows and rows[-1]["step"] >= step:
            rows.pop()
        rows.append(row)
    if not rows:
        hint = "a run writes a row every run.log_every steps; try again later"
        raise InputError(f"`{path}` has no rows yet", hint=hint, path=path)
    return RunRecord(name or folder.resolve().name, folder, rows, read_interventions(folder))


def read_interventions(folder: str | Path) -> list[Intervention]:
    """What ``events.jsonl`` tells, in the order of writing; nothing if there is no such file. Raises ``InputError``."""
    path = Path(folder) / EVENTS
    found: list[Intervention] = []
    for number, event in _lines(path) if path.is_file() else ():
        kind, samples = event.get("event"), event.get("samples")
        if not (isinstance(kind, str) and isinstance(samples, int)):
            raise InputError(f"`{path}` line {number} has no event and samples, so it is not an event of a run", path=path)
        text, time = _describe(event), str(event.get("time", ""))
        left_out = tuple(event["skipped"][-1]) if event.get("skipped") else None
        if isinstance(event.get("until"), int):
            left_out = (samples, event["until"])
        if kind == "rollback" and "to" in event and found and found[-1].kind == kind and "back to" not in found[-1].text:
            before = found.pop()  # a roll-back is two events: the judgement and what was done
            found.append(Intervention(kind, before.samples, f"{before.text}; {text}", time, left_out))
        else:
            found.append(Intervention(kind, samples, text, time, left_out))
    return found


def _describe(event: Mapping[str, Any]) -> str:
    """One line of words for an event."""
    parts: list[str] = []
    if event.get("why"):
        parts.append(str(event["why"]))
    if event.get("to"):
        parts.append(f"back to `{event['to']}`")
        skipped = event.get("skipped")
        if skipped:
            start, end = skipped[-1]
            parts.append(f"samples {start:,} to {end:,} left out")
        if event.get("shrink", 1.0) != 1.0:
            parts.append(f"input gradient factor x {event['shrink']:g}")
        if event.get("rewarm"):
            start, length = event["rewarm"][-1]
            parts.append(f"rate re-warmed over {length:,} samples from {start:,}")
    if isinstance(event.get("until"), int):
        parts.append(f"samples {event['samples']:,} to {event['until']:,} left out")
    if event.get("event") == "resume":
        parts.append(f"from `{event.get('snapshot', '?')}`")
        changes = event.get("changes") or []
        parts.append("changed " + ", ".join(map(str, changes)) if changes else "nothing changed")
    return "; ".join(parts)


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; the last line may be torn, for a run may just be writing it."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise storage_error(path, error, "read") from error
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == last and number == len(lines):  # nothing ends it
                break
            raise InputError(f"`{path}` line {number} is not a JSON object, so no run wrote it", path=path) from error
        found.append((number, value))
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """A short name for each folder: its own, with as many of its parents as it takes to tell it from the others."""
    parts = [Path(folder).resolve().parts for folder in folders]
    longest = max((len(p) for p in parts), default=0)
    for depth in range(1, longest + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
