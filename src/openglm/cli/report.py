"""`glm report`: what a run has done so far, as figures and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openglm.cli import console

EXAMPLES = r"""
[bold]Examples[/bold]

  glm report runs/nano

  glm report runs/nano runs/small --out compared/
"""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folder of a run, as `glm train --out` names it; several are compared."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the report goes.", show_default="RUN/report")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: the numbers, and the files written.")] = False,
) -> None:
    """Draw loss, norms, loss scale, throughput and interventions as PNG files and one HTML page.

    Works beside a run that is going on. Several runs are drawn over each other.
    """
    from openglm.training.report import write_report
    from openglm.training.report.summary import summary_rows

    with console.progress(None, "drawing") as bar:

        def watch(done: int, total: int) -> None:
            bar.total, bar.label = total, "figures"
            bar.advance(done - bar.done)

        made = write_report(runs, out, watch=watch)
    if as_json:
        files = [str(path) for path in made.figures]
        console.write_json({"page": str(made.page), "figures": files, "runs": made.summaries})
        return
    for values in made.summaries:
        console.write(f"{values['run']}")
        for name, text in summary_rows(values):
            console.write(f"  {name:<14}{text}")
    console.note(f"open `{made.page}` in a browser; the figures lie beside it: {', '.join(p.name for p in made.figures)}")
