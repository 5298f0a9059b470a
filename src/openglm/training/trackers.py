"""Mirrors of a run's metrics and events in TensorBoard and trackio. ``metrics.jsonl`` stays the record; these are views."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from openglm.errors import ConfigError

#: Names for ``run.trackers``, and the module that each needs.
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}


class Tracker(Protocol):
    """Somewhere that rows and events go."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``."""
        ...

    def event(self, event: Mapping[str, Any], step: int) -> None:
        """A line of ``events.jsonl``, after so many steps."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` if the package of one is missing."""
    for name in names:
        try:
            importlib.import_module(TRACKERS[name])
        except ImportError as error:
            raise ConfigError(
                f"`run.trackers` names {name}, which is not installed",
                hint=f'install it with: pip install "openglm[{"trackio" if name == "trackio" else "watch"}]"',
                key="run.trackers",
            ) from error


class Trackers:
    """All trackers of a run. One that fails is left out from then on, with one line; the run goes on."""

    def __init__(self, names: Sequence[str], out: Path, recipe: Mapping[str, Any], log: Callable[[str], None]) -> None:
        self._out, self._recipe, self._log = out, recipe, log
        self._names = list(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}
        self._step = 0

    def rewind(self, step: int) -> None:
        """The next rows follow after this step: a resume, or a roll-back."""
        self._step = step

    def row(self, row: Mapping[str, Any]) -> None:
        """Mirror a row."""
        self._step = row["step"]
        self._each(lambda tracker: tracker.row(row))

    def event(self, event: Mapping[str, Any]) -> None:
        """Mirror an event."""
        self._each(lambda tracker: tracker.event(event, self._step))

    def close(self) -> None:
        """Close those that were opened."""
        self._names = [name for name in self._names if name in self._open]
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name in list(self._names):
            try:
                if name not in self._open:
                    self._open[name] = _MAKERS[name](self._out, self._recipe)
                do(self._open[name])
            except Exception as error:  # whatever a view does wrong must not end weeks of training
                self._names.remove(name)
                self._log(f"{name} failed and is left out from here on: {error or type(error).__name__}")


def flatten(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row under names like ``losses/[MASK] en``; the counts that locate it, and single steps, are left out."""
    for key, value in row.items():
        if key in ("step", "steps", "stragglers"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}/{name}", float(number)) for name, number in value.items())
        elif isinstance(value, list):
            yield from ((f"{key}/{place}", float(number)) for place, number in enumerate(value))
        elif isinstance(value, int | float):
            yield key, float(value)


class TensorBoard:
    """Writes ``RUN/tensorboard``: numbers as scalars, events as text."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        self._folder = out / "tensorboard"
        self._scalars: Any = None
        self._events: Any = None
        self._last = 0

    def row(self, row: Mapping[str, Any]) -> None:
        """As ``Tracker``."""
        from torch.utils.tensorboard import SummaryWriter

        step = row["step"]
        if self._scalars is None or step <= self._last:
            if self._scalars is not None:
                self._scalars.close()
            # After a resume or a roll-back TensorBoard drops what an earlier writer wrote of these steps.
            self._scalars = SummaryWriter(str(self._folder), purge_step=step)
        self._last = step
        for name, value in flatten(row):
            self._scalars.add_scalar(name, value, step)
        self._scalars.flush()

    def event(self, event: Mapping[str, Any], step: int) -> None:
        """As ``Tracker``. Events have a writer of their own: a roll-back must not drop what led to it."""
        from torch.utils.tensorboard import SummaryWriter

        if self._events is None:
            self._events = SummaryWriter(str(self._folder / "events"))
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time"))
        self._events.add_text("events", f"**{event['event']}**: {details}", step)
        self._events.flush()

    def close(self) -> None:
        """As ``Tracker``."""
        for writer in (self._scalars, self._events):
            if writer is not None:
                writer.close()


class Trackio:
    """Writes trackio's local database (``TRACKIO_DIR``): project "openglm", one run a folder."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        with _spoken_to_stderr():
            self._run = trackio.init(
                project="openglm",
                name=out.resolve().name,
                config={key: value for key, value in recipe.items() if value not in (None, {}, [])},
                resume="allow",
                embed=False,
                auto_log_gpu=False,  # threads that measure the machine take from the run's time
                auto_log_cpu=False,
            )

    def row(self, row: Mapping[str, Any]) -> None:
        """As ``Tracker``."""
        self._run.log(dict(flatten(row)), step=row["step"])

    def event(self, event: Mapping[str, Any], step: int) -> None:
        """As ``Tracker``."""
        details = {f"event/{key}": str(value) for key, value in event.items()}
        self._run.log(details, step=step)

    def close(self) -> None:
        """As ``Tracker``."""
        import trackio  # pyright: ignore[reportMissingImports]

        with _spoken_to_stderr():
            trackio.finish()


@contextlib.contextmanager
def _spoken_to_stderr() -> Iterator[None]:
    """What a library prints is a remark; stdout is for data."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}
