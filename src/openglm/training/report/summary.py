"""The numbers at the head of a report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openglm.training.report.figures import last_value, slow_ranks
from openglm.training.report.reading import KINDS, RunRecord


def summarize(run: RunRecord) -> dict[str, Any]:
    """Plain values of one run: how far it came, its losses in nats at the end of their smoothed lines, bits per byte.

    What the metrics do not hold is None or left out.
    """
    last = run.rows[-1]
    speed = run.column("tokens_per_second")
    validations = run.validations()
    return {
        "run": run.name,
        "folder": str(run.folder),
        "steps": last["step"],
        "samples": last["samples"],
        "tokens": last.get("tokens"),
        "seconds": last.get("seconds"),
        "loss": _round(last_value(run.each("loss")[1])),
        "losses": {name: _round(last_value(column)) for name, column in sorted(run.table("losses").items())},
        "bits_per_byte": {name: _round(float(values[-1])) for name, (_, values) in sorted(validations.items())},
        "best_bits_per_byte": {name: _round(float(np.nanmin(values))) for name, (_, values) in sorted(validations.items())},
        "tokens_per_second": _round(float(np.nanmedian(speed))) if np.isfinite(speed).any() else None,
        "interventions": run.counts(),
        "stragglers": {str(rank): count for rank, count in slow_ranks(run)},
    }


def summary_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads: names and texts."""
    rows = [
        ("Samples", f"{values['samples']:,} in {values['steps']:,} steps"),
        ("Tokens", "?" if values["tokens"] is None else f"{values['tokens']:,}"),
        ("Time", duration(values["seconds"])),
        ("Throughput", "?" if values["tokens_per_second"] is None else f"{values['tokens_per_second']:,.0f} tokens/s (median)"),
        ("Loss", f"{_show(values['loss'], 3)} nats a token"),
    ]
    if values["losses"]:
        rows.append(("by objective", ", ".join(f"{name} {_show(value, 2)}" for name, value in values["losses"].items())))
    if values["bits_per_byte"]:
        best = values["best_bits_per_byte"]
        texts = [
            f"{name} {_show(value, 3)}" + ("" if value == best[name] else f" (best {_show(best[name], 3)})")
            for name, value in values["bits_per_byte"].items()
        ]
        rows.append(("Bits per byte", ", ".join(texts)))
    counts = values["interventions"]
    ordered = [*(kind for kind in KINDS if kind in counts), *(kind for kind in counts if kind not in KINDS)]
    rows.append(("Interventions", ", ".join(f"{KINDS.get(kind, kind)}: {counts[kind]:,}" for kind in ordered) or "none"))
    if values["stragglers"]:
        named = list(values["stragglers"].items())
        more = f", and {len(named) - 5} more" if len(named) > 5 else ""
        rows.append(("Stragglers", ", ".join(f"rank {rank} ({count:,} rows)" for rank, count in named[:5]) + more))
    return rows


def duration(seconds: float | None) -> str:
    """Days, hours, minutes, seconds: the two largest."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    left = round(seconds)
    parts = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _show(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _round(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
