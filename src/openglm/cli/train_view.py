"""The view of `glm train` on a terminal: what a person wants to see at a glance, and can leave open."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from openglm.training.recipe import Recipe
    from openglm.training.report.reading import Intervention
    from openglm.training.snapshots import Progress
    from openglm.training.step import StepResult

#: Logged values of the sparkline.
POINTS = 60
#: Drawn anew so often in a second; a step does not wait for it.
REFRESH = 2
#: Columns from which two blocks stand side by side, and the left one's share of them.
_WIDE, _LEFT = 76, 0.6
#: Weight of the past in the means that are shown, which are over about twenty steps.
_MEMORY = 0.95
#: Kinds of events that changed what the run does, or ask for somebody; a spike that was only noticed did not.
_COUNTED = ("skip", "rollback", "left_out", "alarm")
#: Seconds between two looks into the run's folder.
_LOOK = 2.0
#: Seconds over which the speed for the time left is measured.
_STRETCH = 300.0


@dataclass(frozen=True)
class _State:
    """What is drawn. Made whole by each step, for another thread draws it: no lock, so nothing waits for the screen."""

    samples: int
    tokens: int
    result: StepResult
    loss: float
    speed: float
    losses: tuple[float, ...]
    groups: dict[str, float]
    validation: dict[str, float]
    before: dict[str, float]
    """The validation before."""
    pace: tuple[float, float] | None
    """Samples a second, and when that was measured."""


class TrainView:
    """Collects what ``watch`` is told and draws it; nothing is drawn before the first step."""

    def __init__(self, recipe: Recipe, run: Path, *, console: Console | None = None, to_stdout: bool = True) -> None:
        """``to_stdout``: whether what the program writes to stdout appears on the same terminal."""
        self.recipe, self.run = recipe, run
        self._console = console or Console(stderr=True)
        self._live = Live(
            console=self._console,
            get_renderable=lambda: self,
            refresh_per_second=REFRESH,
            redirect_stdout=to_stdout,
            vertical_overflow="crop",
        )
        self._began = time.monotonic()
        self._state: _State | None = None
        self._losses: deque[float] = deque(maxlen=POINTS)
        self._loss, self._speed = _Mean(), _Mean()
        self._groups: dict[str, _Mean] = {}
        self._validation: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._stretch: deque[tuple[float, int]] = deque()
        self._looked = -_LOOK
        self._snapshot: float | None = None
        self._interventions: list[Intervention] = []
        self._events_size = -1

    # --- what the run tells

    def watch(self, progress: Progress, result: StepResult, speed: float) -> None:
        """As ``training.run.Watcher``: called after each step, and cheap."""
        if self._state is None:
            self._recall(progress)
        self._loss.add(result.loss * result.targets, result.targets)
        self._speed.add(speed, 1)
        for name, (total, count) in result.groups.items():
            self._groups.setdefault(name, _Mean()).add(total, count)
        if progress.steps % self.recipe.run.log_every == 0:
            self._losses.append(result.loss)
        if progress.validation != self._validation:
            self._before, self._validation = self._validation, dict(progress.validation)
        now = time.monotonic()
        if self._stretch and self._stretch[-1][1] > progress.samples:
            self._stretch.clear()  # rolled back
        self._stretch.append((now, progress.samples))
        while now - self._stretch[0][0] > _STRETCH and len(self._stretch) > 2:
            self._stretch.popleft()
        (began, start), pace = self._stretch[0], None
        if progress.samples > start and now > began:
            pace = (progress.samples - start) / (now - began), now
        self._state = _State(
            progress.samples,
            progress.tokens,
            result,
            self._loss.value,
            self._speed.value,
            tuple(self._losses),
            {name: mean.value for name, mean in sorted(self._groups.items())},
            self._validation,
            self._before,
            pace,
        )
        if not self._live.is_started:
            self._live.start()

    def _recall(self, progress: Progress) -> None:
        """After a resume: the sparkline and the last two validations from the metrics."""
        validations: list[dict[str, float]] = []
        for row in _last_rows(self.run / "metrics.jsonl"):
            if row.get("samples", 0) < progress.samples and isinstance(row.get("loss"), float):
                self._losses.append(row["loss"])
                found = row.get("bits_per_byte")
                if found and (not validations or found != validations[-1]):
                    validations.append(found)
        if validations:
            self._validation = validations[-1]
            self._before = validations[-2] if len(validations) > 1 else {}

    def _look(self) -> None:
        """What lies in the folder: the newest snapshot, and the events."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        from openglm.errors import OpenGLMError
        from openglm.training.report.reading import EVENTS, read_interventions

        try:
            times = [path.stat().st_mtime for path in (self.run / "snapshots").glob("samples-*")]
            self._snapshot = max(times, default=None)
            events = self.run / EVENTS
            size = events.stat().st_size if events.is_file() else 0
            if size != self._events_size:
                self._events_size = size
                self._interventions = [one for one in read_interventions(self.run) if one.kind in _COUNTED]
        except (OSError, OpenGLMError):
            pass  # just being written, or gone: the next look will tell

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live.is_started:
            self._live.stop()

    # --- what a person sees

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self._state
        if state is None:
            return
        self._look()
        width = options.max_width
        yield self._head(state, width)
        room = width if width < _WIDE else int(width * _LEFT)
        left, right = _losses_block(state, room, options.ascii_only), self._state_block(state)
        if width < _WIDE:
            yield _grid([*left, *right])
        else:
            both = Table.grid()
            both.add_column(width=room)
            both.add_column(width=width - room)
            both.add_row(_grid(left), _grid(right))
            yield both
        yield from self._foot()

    def _head(self, state: _State, width: int) -> RenderableType:
        total = self.recipe.run.samples
        left = None if state.pace is None else (total - state.samples) / state.pace[0] - (time.monotonic() - state.pace[1])
        share = f"{state.samples / total:.1%}"
        counts = Text(f"{state.samples:,} of {total:,} samples, {share}", no_wrap=True, overflow="ellipsis")
        times = Text(f"{_time(time.monotonic() - self._began)} here, {_time(left)} left", style="cyan", no_wrap=True)
        bar = ProgressBar(total=total, completed=state.samples)
        beside = [counts, times] if width >= _WIDE else []
        head = Table.grid(expand=True, padding=(0, 2, 0, 0) if beside else 0)
        head.add_column(ratio=1)
        head.add_row(bar, *beside)
        return head if beside else Group(head, counts, times)

    def _state_block(self, state: _State) -> list[tuple[str, Text]]:
        result, age = state.result, None if self._snapshot is None else time.time() - self._snapshot
        rows = [
            ("tokens/s", Text(f"{state.speed:,.0f}")),
            ("tokens", Text(f"{state.tokens:,}")),
            ("gradient norm", Text(f"{result.gradient_norm:.3g}")),
            ("learning rate", Text(f"{result.learning_rate:.3g}")),
        ]
        if self.recipe.run.precision == "float16":
            rows.append(("loss scale", Text(f"{result.loss_scale:,.0f}")))
        rows.append(("snapshot", Text("none yet" if age is None else f"{_time(age)} ago")))
        count = len(self._interventions)
        rows.append(("interventions", Text(f"{count:,}" if count else "none", style="bold red" if count else "")))
        return rows

    def _foot(self) -> Iterable[RenderableType]:
        if self._interventions:
            last = self._interventions[-1]
            words = f"last, at sample {last.samples:,}: {last.name}, {last.text}"
            yield Text(words, style="red", no_wrap=True, overflow="ellipsis")
        words = f"{self.run}  (Ctrl-C saves and stops; glm report draws it)"
        yield Text(words, style="dim", no_wrap=True, overflow="ellipsis")


class _Mean:
    """A weighted mean in which the past fades."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, total: float, weight: float) -> None:
        """``total``: sum of ``weight`` values. What is not a number is left out."""
        if total == total and abs(total) != float("inf"):
            self._sum = self._sum * _MEMORY + total
            self._weight = self._weight * _MEMORY + weight

    @property
    def value(self) -> float:
        """NaN before the first number."""
        return self._sum / self._weight if self._weight else float("nan")


def _losses_block(state: _State, room: int, ascii_only: bool) -> list[tuple[str, Text]]:
    rows = [(f"  {name}", Text(f"{mean:.3f}")) for name, mean in state.groups.items()]
    for language, value in sorted(state.validation.items()):
        text = Text(f"{value:.4f}")
        if language in state.before:
            change = value - state.before[language]
            text.append(f"  {change:+.4f}", style="green" if change <= 0 else "red")
        rows.append((f"bits/byte {language}", text))
    loss = f"{state.loss:.4f}"
    left = room - _label_width(rows) - len(loss) - 6
    line = sparkline(state.losses[-max(left, 8) :], ascii_only)
    return [("loss", Text.assemble((loss, "bold"), "  ", (line, "green"))), *rows]


def _label_width(rows: Iterable[tuple[str, Text]]) -> int:
    return max([13, *(min(len(label), 20) for label, _ in rows)])


def _grid(rows: list[tuple[str, Text]]) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="dim", width=_label_width(rows), no_wrap=True)
    made.add_column(no_wrap=True, overflow="ellipsis")
    for label, value in rows:
        made.add_row(Text(label), value)
    return made


def sparkline(values: Iterable[float], ascii_only: bool = False) -> str:
    """One character a value, the lowest to the highest; what is not finite is a cross."""
    steps = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    values = list(values)
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return "x" * len(values)
    low, span = min(finite), max(finite) - min(finite)

    def step(value: float) -> str:
        return steps[int((value - low) / span * (len(steps) - 1) + 0.5) if span else 0]

    return "".join(step(value) if abs(value) < float("inf") else "x" for value in values)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    from openglm.training.report.summary import duration

    return duration(max(seconds, 0.0))


def _last_rows(path: Path, size: int = 300_000) -> list[Mapping[str, Any]]:
    """Rows from the last ``size`` bytes of a file of JSON lines; a long run has a long one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - size, 0))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first, cut through
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
