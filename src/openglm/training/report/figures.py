"""The figures of a report: one function a theme, for one run and for several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openglm.training.report.lines import (
    MOST_LINES,
    Look,
    Series,
    count_axis,
    draw_lines,
    draw_marks,
    drawing,
    figure,
    fold,
    picture,
    smooth,
)
from openglm.training.report.reading import RunRecord

#: Ranks a plot names; the others are a band.
_NAMED_RANKS = 4


@dataclass(frozen=True)
class Theme:
    """One figure of a report. ``draw`` gives None where a run has nothing to show."""

    name: str
    """Of the file."""
    title: str
    note: str
    """What one sees, in a sentence."""
    draw: Callable[[RunRecord, Look], Any]
    compare: Callable[[Sequence[RunRecord], Look], Any] | None = None


def _series(run: RunRecord, key: str) -> list[Series]:
    x = run.samples
    return fold([Series(name, x, y) for name, y in run.table(key).items() if np.isfinite(y).any()])


def _finish(made: Any, panels: Sequence[Any], run: RunRecord, look: Look) -> Any:
    """Samples below, tokens above, interventions as vertical lines."""
    samples = run.samples.astype(float)
    last = max([samples[-1], *(one.samples for one in run.interventions)])
    first = min(samples[0], *(one.samples for one in run.interventions)) if run.interventions else samples[0]
    # From the first sample on, unless what there is lies far behind it.
    low = 0.0 if first < 0.5 * last else first
    pad = 0.01 * (last - low) or 1.0
    panels[0].set_xlim(low - pad, last + pad)
    tokens = run.column("tokens")
    good = np.isfinite(tokens)
    if good.sum() > 1 and (np.diff(tokens[good]) > 0).all() and (np.diff(samples[good]) > 0).all():
        s, t = np.concatenate([[0.0], samples[good]]), np.concatenate([[0.0], tokens[good]])
        ends = (_line(s, t), _line(t, s))
        above = panels[0].secondary_xaxis("top", functions=ends)
        above.spines["top"].set_visible(False)
        above.tick_params(labelsize=8, length=2, pad=1, colors=look.faint)
        above.xaxis.label.set(color=look.faint, size=8)
        count_axis(above.xaxis, "tokens", t[-1])
    draw_marks(panels, run.interventions, lambda place: place, look)
    return made


def _line(x: np.ndarray, y: np.ndarray) -> Callable[[Any], np.ndarray]:
    """The straight pieces through points, going on with the mean slope outside of them."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])

    def at(value: Any) -> np.ndarray:
        value = np.asarray(value, dtype=float)
        outside = np.where(value > x[-1], value - x[-1], np.minimum(value - x[0], 0.0))
        return np.interp(value, x, y) + slope * outside

    return at


def _label_x(panels: Sequence[Any], run: RunRecord) -> None:
    count_axis(panels[-1].xaxis, "samples", max([float(run.samples[-1]), *(float(e.samples) for e in run.interventions)]))


def last_value(values: np.ndarray) -> float:
    """The end of the smoothed line; NaN if there is no number."""
    good = values[np.isfinite(values)]
    return float(smooth(good)[-1]) if len(good) else float("nan")


def loss(run: RunRecord, look: Look) -> Any:
    """The loss of all tokens, and by objective and language."""
    groups = _series(run, "losses")
    made, panels = figure(2 if groups else 1)
    _label_x(panels, run)
    all_steps = Series("all", *run.each("loss"))
    panels[0].set(title=f"Loss, {last_value(all_steps.y):.3f} at the end", ylabel="nats a token")
    draw_lines(panels[0], [all_steps], look, digits=None)
    if groups:
        panels[1].set(title="Loss by objective and language", ylabel="nats a token")
        draw_lines(panels[1], groups, look)
    return _finish(made, panels, run, look)


def sources(run: RunRecord, look: Look) -> Any:
    """The loss by source of the text."""
    found = _series(run, "sources")
    if not found:
        return None
    made, panels = figure(height=3.9)
    _label_x(panels, run)
    panels[0].set(title="Loss by source", ylabel="nats a token")
    draw_lines(panels[0], found, look)
    return _finish(made, panels, run, look)


def bits_per_byte(run: RunRecord, look: Look) -> Any:
    """The validation texts."""
    points = run.validations()
    found = [Series(name, run.samples[places], values) for name, (places, values) in points.items()][:MOST_LINES]
    if not found:
        return None
    made, panels = figure()
    _label_x(panels, run)
    panels[0].set(title="Validation", ylabel="bits per byte")
    draw_lines(panels[0], found, look, smoothed=False, markers=max(len(one.x) for one in found) <= 60, digits=3)
    return _finish(made, panels, run, look)


def norms(run: RunRecord, look: Look) -> Any:
    """Norms of gradient and update, the whole and by group of parameters."""
    total = Series("all", *run.each("gradient_norm"))
    groups, updates = run.table("gradient_norms"), run.table("update_norms")
    if not np.isfinite(total.y).any():
        return None
    made, panels = figure(2 if updates else 1)
    _label_x(panels, run)
    panels[0].set(title="Gradient norm before clipping", ylabel="norm (log)")
    draw_lines(panels[0], fold([total, *_groups(run, groups)]), look, log=True)
    if updates:
        panels[1].set(title="Norm of the update", ylabel="norm (log)")
        # The colour of a group is the same above and below; above, the first belongs to the whole.
        nothing = Series("", run.samples, np.full(len(run.rows), np.nan))
        draw_lines(panels[1], fold([nothing, *_groups(run, updates)]), look, log=True)
    return _finish(made, panels, run, look)


def _groups(run: RunRecord, columns: dict[str, np.ndarray]) -> list[Series]:
    """Groups of parameters from the embedding up; of many, lowest, middle and highest layers come before the rest."""
    made = [Series(name, run.samples, y) for name, y in sorted(columns.items(), key=_group_order)]
    if len(made) < MOST_LINES:
        return made
    layers = [place for place, one in enumerate(made) if _group_order((one.name, None))[0] == 1]
    if not layers:
        return made
    first = [place for place in range(len(made)) if place < layers[0]]
    first += [layers[0], layers[len(layers) // 2], layers[-1]]
    return [made[place] for place in first] + [one for place, one in enumerate(made) if place not in first]


def _group_order(item: tuple[str, Any]) -> tuple[int, int]:
    """Embedding, layers upwards, final norm."""
    name = item[0]
    digits = "".join(c for c in name.partition("-")[0] if c.isdigit())
    return (0 if name == "embedding" else 1 if digits else 2), int(digits or 0)


def learning_rate(run: RunRecord, look: Look) -> Any:
    """The schedule as it was."""
    rate = run.column("learning_rate")
    if not np.isfinite(rate).any():
        return None
    made, panels = figure(height=2.6)
    _label_x(panels, run)
    panels[0].set(title="Learning rate", ylabel="learning rate")
    line = [Series("learning rate", run.samples, rate)]
    draw_lines(panels[0], line, look, smoothed=False, digits=None, robust=False)
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-"))
    return _finish(made, panels, run, look)


def loss_scale(run: RunRecord, look: Look) -> Any:
    """Float16's loss scale; other precisions have none."""
    samples, scale = run.each("loss_scale")
    if not np.isfinite(scale).any() or np.nanmin(scale) == np.nanmax(scale) == 1.0:
        return None
    made, panels = figure(height=2.6)
    _label_x(panels, run)
    panels[0].set(title="Loss scale (float16)", ylabel="loss scale")
    good = np.isfinite(scale) & (scale > 0)
    panels[0].step(samples[good], scale[good], where="post", color=look.lines[0], zorder=3)
    low, high = np.log2(scale[good].min()), np.log2(scale[good].max())
    panels[0].set_yscale("log", base=2)
    panels[0].set_ylim(2 ** (low - 1), 2 ** (high + 1))
    powers = np.unique(np.linspace(low, high, int(min(high - low, 6)) + 1).round())
    panels[0].set_yticks(2.0**powers, [f"{2.0**p:,.0f}" for p in powers])
    return _finish(made, panels, run, look)


def throughput(run: RunRecord, look: Look) -> Any:
    """Tokens a second, and where there are several processes the own work of each in a step."""
    speed = run.column("tokens_per_second")
    ranks = _rank_seconds(run)
    if not np.isfinite(speed).any():
        return None
    made, panels = figure(1 if ranks is None else 2, height=2.9)
    _label_x(panels, run)
    panels[0].set(title=f"Throughput, median {np.nanmedian(speed):,.0f} tokens/s", ylabel="tokens/s")
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    draw_lines(panels[0], [Series("all", run.samples, speed)], look, digits=None, robust=False)
    panels[0].set_ylim(bottom=0)
    if ranks is not None:
        _draw_ranks(panels[1], run, ranks, look)
    return _finish(made, panels, run, look)


def _rank_seconds(run: RunRecord) -> np.ndarray | None:
    """Seconds of own work a step, float64 ``[rows, ranks]``; NaN where a row has none."""
    lists: list[list[float]] = [row.get("rank_seconds") or [] for row in run.rows]
    most = max(map(len, lists))
    if most < 2:
        return None
    return np.array([[*values, *[np.nan] * (most - len(values))] for values in lists])


def slow_ranks(run: RunRecord) -> list[tuple[int, int]]:
    """(rank, rows in which it was a straggler), the most frequent first."""
    counts: dict[int, int] = {}
    for row in run.rows:
        for rank in row.get("stragglers") or ():
            counts[rank] = counts.get(rank, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _draw_ranks(axes: Any, run: RunRecord, seconds: np.ndarray, look: Look) -> None:
    good = np.isfinite(seconds).any(1)
    x, seconds = run.samples[good], seconds[good]
    ranks = seconds.shape[1]
    slow = [(rank, count) for rank, count in slow_ranks(run) if rank < ranks][:_NAMED_RANKS]
    axes.set(title=f"Own work of {ranks} ranks", ylabel="seconds a step")
    if ranks <= _NAMED_RANKS:
        words = dict(slow_ranks(run))
        names = [f"rank {rank}" + (f", straggler in {words[rank]:,} rows" if rank in words else "") for rank in range(ranks)]
        draw_lines(axes, [Series(name, x, seconds[:, rank]) for rank, name in enumerate(names)], look)
    else:
        axes.fill_between(x, np.nanmin(seconds, 1), np.nanmax(seconds, 1), color=look.faint, alpha=0.25, linewidth=0)
        lines = [Series("median of all", x, np.nanmedian(seconds, 1))]
        lines += [Series(f"rank {rank}, straggler in {count:,} rows", x, seconds[:, rank]) for rank, count in slow]
        draw_lines(axes, lines, look)
    axes.set_ylim(bottom=0)


# --- several runs


def _over_runs(
    title: str, unit: str, key: str, *, log: bool = False, digits: int | None = 2
) -> Callable[[Sequence[RunRecord], Look], Any]:
    """A figure with one line a run, over tokens: runs may differ in the length of their samples."""

    def draw(runs: Sequence[RunRecord], look: Look) -> Any:
        series = [Series(run.name, *_against_tokens(run, run.column(key))) for run in runs]
        if not any(np.isfinite(one.y).any() for one in series):
            return None
        made, panels = figure(height=4.0)
        _label_tokens(panels, runs)
        panels[0].set(title=title, ylabel=unit)
        draw_lines(panels[0], series, look, log=log, digits=digits, smoothed=key != "learning_rate")
        if not log and digits == 0:
            panels[0].yaxis.set_major_formatter("{x:,.0f}")
        return made

    return draw


def _against_tokens(run: RunRecord, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = run.column("tokens")
    return tokens, np.where(np.isfinite(tokens), values, np.nan)


def _label_tokens(panels: Sequence[Any], runs: Sequence[RunRecord]) -> None:
    count_axis(panels[-1].xaxis, "tokens", float(np.nanmax([np.nanmax(np.append(run.column("tokens"), 1.0)) for run in runs])))


def compared_bits_per_byte(runs: Sequence[RunRecord], look: Look) -> Any:
    """Validation by language, a panel each."""
    points = {run.name: run.validations() for run in runs}
    languages = sorted({language for found in points.values() for language in found})[:4]
    if not languages:
        return None
    made, panels = figure(len(languages), height=3.0)
    _label_tokens(panels, runs)
    for axes, language in zip(panels, languages, strict=True):
        axes.set(title=f"Validation, {language}", ylabel="bits per byte")
        series = []
        for run in runs:
            places, values = points[run.name].get(language, (np.array([], int), np.array([])))
            series.append(Series(run.name, run.column("tokens")[places], values))
        draw_lines(axes, series, look, smoothed=False, markers=True, digits=3)
    return made


THEMES = (
    Theme(
        "loss",
        "Loss",
        "Faint: each step (of parts, each logged one). Strong: the mean.",
        loss,
        _over_runs("Loss", "nats a token", "loss"),
    ),
    Theme("bits_per_byte", "Validation", "Held-out texts; the fewer bits, the better.", bits_per_byte, compared_bits_per_byte),
    Theme("sources", "Sources", "Which texts are hard.", sources),
    Theme(
        "norms",
        "Norms",
        "The gradient before clipping and the change of the weights, by group of parameters.",
        norms,
        _over_runs("Gradient norm before clipping", "norm (log)", "gradient_norm", log=True),
    ),
    Theme(
        "learning_rate",
        "Learning rate",
        "As it was applied, re-warmings included.",
        learning_rate,
        _over_runs("Learning rate", "learning rate", "learning_rate", digits=None),
    ),
    Theme("loss_scale", "Loss scale", "It halves when float16 overflows and grows back.", loss_scale),
    Theme(
        "throughput",
        "Throughput",
        "Tokens in a second of training, validation and snapshots left out.",
        throughput,
        _over_runs("Throughput", "tokens/s", "tokens_per_second", digits=0),
    ),
)


def draw_theme(theme: Theme, runs: Sequence[RunRecord], look: Look) -> bytes | None:
    """A PNG of one run or several, or None where there is nothing to show. Raises ``InputError`` without matplotlib."""
    with drawing(look):
        draw = theme.draw(runs[0], look) if len(runs) == 1 else theme.compare(runs, look) if theme.compare else None
        return None if draw is None else picture(draw)
