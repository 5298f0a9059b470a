"""Reports on runs: figures as PNG files and one HTML page, from the files that a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openglm.errors import InputError
from openglm.storage import atomic_write, remove
from openglm.training.report.reading import RunRecord, distinct_names, read_run

PAGE = "report.html"
#: Runs in one report; more lines nobody tells apart.
MOST_RUNS = 6


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    figures: list[Path]
    summaries: list[dict[str, Any]]
    """Of each run, as ``summary.summarize`` makes them."""


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, watch: Callable[[int, int], None] | None = None
) -> Report:
    """Draw one run, or several over each other, into ``out`` (default for one run: its folder's ``report``).

    A report that lies there is replaced file by file; other files in the folder stay. ``watch`` is told how many figures
    of how many are done. Raises ``InputError`` for a folder without metrics, too many runs, a foreign file in the way, or
    where matplotlib is missing; ``StorageError`` where the disk refuses.
    """
    from openglm.training.report.figures import THEMES, draw_theme
    from openglm.training.report.lines import DARK, LIGHT
    from openglm.training.report.page import make_page
    from openglm.training.report.summary import summarize

    if not 1 <= len(folders) <= MOST_RUNS:
        raise InputError(f"a report compares 1 to {MOST_RUNS} runs, not {len(folders)}", hint="make several reports")
    if out is None and len(folders) > 1:
        raise InputError("several runs need a folder for their report", hint="give one with --out")
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    target = Path(out) if out is not None else runs[0].folder / "report"
    _check_target(target, [f"{theme.name}.png" for theme in THEMES])
    drawn: list[tuple[Any, bytes, bytes]] = []
    for done, theme in enumerate(THEMES):
        if watch:
            watch(done, len(THEMES))
        light, dark = (draw_theme(theme, runs, look) for look in (LIGHT, DARK))
        if light is not None and dark is not None:
            drawn.append((theme, light, dark))
    summaries = [summarize(run) for run in runs]
    page = make_page(runs, summaries, drawn)
    figures = []
    for theme in THEMES:
        path = target / f"{theme.name}.png"
        light = next((light for other, light, _ in drawn if other is theme), None)
        if light is None:
            remove(path)  # of an earlier report
            continue
        with atomic_write(path) as file:
            file.write(light)
        figures.append(path)
    with atomic_write(target / PAGE, "w") as file:
        file.write(page)
    return Report(target / PAGE, figures, summaries)


def _check_target(target: Path, names: Sequence[str]) -> None:
    """Only an earlier report of ours may be replaced."""
    from openglm.training.report.page import GENERATOR

    if target.exists() and not target.is_dir():
        raise InputError(f"`{target}` is a file, not a folder", hint="give another --out", path=target)
    page = target / PAGE
    if page.is_file():
        with open(page, encoding="utf-8", errors="replace") as file:
            if GENERATOR in file.read(1000):
                return
    for name in (PAGE, *names):
        if (target / name).exists():
            raise InputError(
                f"`{target / name}` exists and is not of a report", hint="give another --out or move it", path=target / name
            )


__all__ = ["Report", "RunRecord", "read_run", "write_report"]
