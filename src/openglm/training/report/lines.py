"""How a figure looks: colours that colour-blind people tell apart, axes with units, smoothed lines over faint raw ones."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from openglm.errors import InputError
from openglm.training.report.reading import KINDS, Intervention

#: Lines in a plot; what is more becomes their mean.
MOST_LINES = 6
WIDTH = 7.2
"""Inches."""
DPI = 150
#: Okabe and Ito's palette (2008), which people with any of the usual kinds of colour blindness tell apart.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DARK = ("#56B4E9", "#FF7F41", "#2FBF94", "#E396C3", "#F0E442", "#D0D4DA")
#: Line style and width of each kind of intervention: they differ without colour, too.
_MARKS = {
    "rollback": ("-", 1.3),
    "skip": (":", 1.1),
    "alarm": ("-.", 1.3),
    "step": ("-.", 0.9),
    "left_out": (":", 0.9),
    "resume": ("--", 0.9),
}
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei")


@dataclass(frozen=True)
class Look:
    """The colours of a figure."""

    ground: str
    ink: str
    grid: str
    faint: str
    """Of lines that stand for many."""
    lines: tuple[str, ...]
    marks: Mapping[str, str]
    """Of interventions."""


LIGHT = Look(
    "#ffffff",
    "#222222",
    "#e4e4e4",
    "#8a8a8a",
    _LIGHT,
    {"rollback": "#B00020", "skip": "#B00020", "alarm": "#B00020", "resume": "#6b6b6b"},
)
DARK = Look(
    "#16181c",
    "#dddddd",
    "#33363c",
    "#9a9a9a",
    _DARK,
    {"rollback": "#FF6E6E", "skip": "#FF6E6E", "alarm": "#FF6E6E", "resume": "#a8a8a8"},
)


@dataclass(frozen=True)
class Series:
    """A line to draw."""

    name: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False


@contextmanager
def drawing(look: Look) -> Iterator[None]:
    """Settings of matplotlib for one figure. Raises ``InputError`` where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        raise InputError("drawing needs matplotlib", hint='install it with: pip install "openglm[watch]"') from error
    installed = set(font_manager.get_font_names())
    settings: Any = {
        "font.family": [name for name in _FONTS if name in installed],
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.facecolor": look.ground,
        "figure.facecolor": look.ground,
        "savefig.facecolor": look.ground,
        "text.color": look.ink,
        "axes.labelcolor": look.ink,
        "axes.edgecolor": look.faint,
        "xtick.color": look.ink,
        "ytick.color": look.ink,
        "axes.grid": True,
        "grid.color": look.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "text.parse_math": False,  # a source may be called anything, dollar signs included
    }
    logger = logging.getLogger("matplotlib")
    level = logger.level
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def smooth(values: np.ndarray) -> np.ndarray:
    """A mean over about a fortieth of the rows around each, float64 ``[rows]``, that a few wild rows do not move."""
    half = len(values) // 80
    if not half:
        return values
    # Medians of nine first: a mean alone draws a spike of three rows as a table mountain.
    near = np.lib.stride_tricks.sliding_window_view(np.pad(values, 4, mode="reflect"), 9)
    sums = np.concatenate([[0.0], np.cumsum(np.median(near, axis=1))])
    places = np.arange(len(values))
    # Narrower and narrower towards the ends, so that a slope is not bent there, but never a single row.
    reach = np.maximum(np.minimum(np.minimum(places, places[::-1]), half), -(-half // 3))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def fold(series: Sequence[Series], most: int = MOST_LINES) -> list[Series]:
    """At most ``most`` lines: the first ones, and the mean of the others, which must share their x."""
    if len(series) <= most:
        return list(series)
    rest = np.stack([one.y for one in series[most - 1 :]])
    count = np.isfinite(rest).sum(0)
    mean = np.where(count > 0, np.nansum(np.where(np.isfinite(rest), rest, 0.0), 0) / np.maximum(count, 1), np.nan)
    return [*series[: most - 1], Series(f"mean of {len(rest)} others", series[-1].x, mean, faint=True)]


def figure(panels: int = 1, height: float = 3.3, *, shared: bool = True) -> tuple[Any, list[Any]]:
    """An empty figure with panels above each other that share the horizontal axis, or have one each."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height * panels + 0.4), dpi=DPI, layout="constrained")
    engine: Any = made.get_layout_engine()
    engine.set(h_pad=0.08, hspace=0.06)
    return made, list(made.subplots(panels, 1, sharex=shared, squeeze=False)[:, 0])


def draw_lines(
    axes: Any,
    series: Sequence[Series],
    look: Look,
    *,
    smoothed: bool = True,
    log: bool = False,
    markers: bool = False,
    digits: int | None = 2,
    robust: bool = True,
) -> None:
    """Draw lines with a legend below that tells the last value of each (``digits`` behind the point; None: no value)."""
    shown: list[np.ndarray] = []
    raw_values: list[np.ndarray] = []
    for place, one in enumerate(series):
        color = look.faint if one.faint else look.lines[place % len(look.lines)]
        good = np.isfinite(one.y) & ((one.y > 0) | (not log))
        x, y = one.x[good], one.y[good]
        if not len(x):
            continue
        line = (np.exp(smooth(np.log(y))) if log else smooth(y)) if smoothed else y
        if smoothed and len(y) >= 80:
            axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8, zorder=1.5)
        label = one.name if digits is None else f"{one.name}  {_short(line[-1], digits)}"
        dot = "o" if markers or len(x) == 1 else ""
        style = "--" if one.faint else "-"
        axes.plot(x, line, color=color, label=_legend_safe(label), marker=dot, markersize=4, linestyle=style, zorder=3)
        shown.append(line)
        raw_values.append(y)
    if log:
        axes.set_yscale("log")
        _readable_log(axes, raw_values)
    elif robust and shown:
        _crop(axes, np.concatenate(shown), np.concatenate(raw_values))
    if len(series) > 1 or digits is not None:
        legend_below(axes)


def legend_below(axes: Any) -> None:
    """A legend under the axes, in as many columns as its words allow."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        from matplotlib.transforms import ScaledTranslation

        widest = max(len(label) for label in labels)
        columns = max(1, min(len(labels), 4, 84 // (widest + 7)))
        points = 36 if axes.get_xlabel() else 5  # ticks and their label come first where there are any
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(-0.01, 0),
            bbox_transform=axes.transAxes + ScaledTranslation(0, -points / 72, axes.figure.dpi_scale_trans),
            ncols=columns,
            borderaxespad=0,
            columnspacing=1.6,
            handlelength=1.6,
        )


def draw_marks(panels: Sequence[Any], events: Sequence[Intervention], x_of: Any, look: Look) -> None:
    """Vertical lines where something was done, and on the first panel what the lines mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    style: Any
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in events)]
    for kind in kinds:
        places = sorted({float(x_of(one.samples)) for one in events if one.kind == kind})
        style, width = _MARKS[kind]
        color = look.marks.get(kind, look.faint)
        alpha = 0.85 if len(places) <= 40 else 0.3
        for axes in panels:
            for x in places:
                axes.axvline(x, color=color, linestyle=style, linewidth=width, alpha=alpha, zorder=2)
        count = sum(one.kind == kind for one in events)
        label = KINDS[kind] if count == 1 else f"{KINDS[kind]} ({count:,} times)"
        handles.append(Line2D([], [], color=color, linestyle=style, linewidth=width, label=label))
    gaps = {one.left_out for one in events if one.left_out}
    for axes in panels:
        for start, end in gaps:
            axes.axvspan(start, end, color=look.grid, linewidth=0, zorder=0.5)
    if gaps:
        handles.append(Patch(color=look.grid, label="samples left out"))
    if handles:
        panels[0].figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8.5, handlelength=1.6)


def picture(made: Any) -> bytes:
    """A figure as PNG, in 256 colours: more are not in it, and the page is a third as large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(made)
    canvas.draw()
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256).save(file, "png", optimize=True)
    return file.getvalue()


def count_axis(axis: Any, label: str, most: float) -> None:
    """Ticks of a large count in thousands, millions or billions, with the unit in the label."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1, ""))
    scale, word = next((size, word) for size, word in units if most >= 2 * size or size == 1)
    axis.set_major_locator(MaxNLocator(7, integer=scale == 1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:,.6g}"))
    axis.set_label_text(f"{word}{label}")


def _short(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if 0.1 <= abs(value) < 1e7 else f"{value:.3g}"


def _legend_safe(label: str) -> str:
    return f" {label}" if label.startswith("_") else label  # a legend leaves out what begins with an underscore


def _crop(axes: Any, lines: np.ndarray, raw: np.ndarray) -> None:
    """A few wild values must not flatten the rest: they become triangles at the upper edge."""
    low, high = float(raw.min()), float(max(lines.max(), np.quantile(raw, 0.98)))
    top = high + 0.08 * max(high - low, 0.02 * abs(high), 1e-9)
    if float(raw.max()) <= top + 0.5 * (top - low):
        return
    axes.set_ylim(low - 0.05 * (top - low), top)
    for line in [one for one in axes.get_lines() if one.get_alpha() is not None]:
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        over = y > top
        axes.plot(x[over], np.full(over.sum(), top), "^", color=line.get_color(), markersize=4, clip_on=False, zorder=4)


def _readable_log(axes: Any, drawn: Sequence[np.ndarray]) -> None:
    """Plain numbers instead of powers where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate(drawn) if drawn else np.array([1.0])
    decades = np.log10(values.max() / values.min())
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.1 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
