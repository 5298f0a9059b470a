"""`glm train`: a recipe becomes a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from openglm.cli import console
from openglm.errors import InputError

EXAMPLES = r"""
[bold]Examples[/bold]

  glm train recipes/nano.toml --data corpus/ --tokenizer unigram.model --out runs/nano

  glm train recipes/nano.toml --data corpus/ --set run.batch_size=64 --stop-after 3600

  torchrun --nproc-per-node 2 -m openglm train recipes/nano.toml --data corpus/ --set parallel.tensor=2
"""


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, and how.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Training text (.jsonl, .jsonl.zst, .txt), or token shards.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="FILE", help="Tokenizer, if the recipe names none.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run.", show_default="runs/NAME-OF-RECIPE")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, run.seed=7 for one; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest snapshot of RUN, and fail if there is none.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the snapshots of RUN and start anew.")] = False,
    stop_after: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Save and stop after this time; the same command goes on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a logged step.")] = False,
) -> None:
    """Train a model.

    The same command goes on from the newest snapshot after an interruption.
    """
    if resume and fresh:
        raise InputError("`--resume` and `--fresh` exclude each other", hint="give one of them")
    if stop_after is not None and not stop_after > 0:
        raise InputError(f"`--stop-after` must be above 0 seconds, not {stop_after:g}")
    from openglm.training.recipe import read_recipe

    paths = [("data.corpus", data), ("data.tokenizer", tokenizer)]
    given = [f"{key}={_toml(path)}" for key, path in paths if path is not None]
    read = read_recipe(recipe, [*(changes or []), *given])
    run = out or Path("runs") / recipe.stem
    if resume and not any((run / "snapshots").glob("*")):
        raise InputError(f"`{run}` holds no snapshot to resume from", hint="leave --resume out to begin the run")
    from openglm.checkpoints import resolve_device
    from openglm.training.run import train as run_training

    resolve_device(read.run.device)  # told before the data is prepared

    lead = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
    with console.progress(read.run.samples, "samples") if lead else nullcontext(_Silent()) as bar:

        def watch(progress: Any, result: Any, speed: float) -> None:
            bar.label = f"loss {result.loss:.3f}, {speed:,.0f} tokens/s"
            bar.advance(progress.samples - bar.done)
            if as_json and progress.steps % read.run.log_every == 0:
                row = {"step": progress.steps, "samples": progress.samples, "loss": result.loss, "tokens_per_second": speed}
                console.write_json(row)

        with _interruptible() as interrupted:
            try:
                model = run_training(
                    read,
                    run,
                    fresh=fresh,
                    stop_after=stop_after,
                    should_stop=lambda: bool(interrupted),
                    log=console.note,
                    watch=watch,
                )
            except KeyboardInterrupt:
                interrupted.append(True)
        if interrupted and lead:
            bar.close()
            console.note(f"interrupted; the same command goes on from the newest snapshot in `{run}`")
        if interrupted:
            raise typer.Exit(130)
    if not lead:
        return
    if as_json:
        console.write_json({"model": str(model)})
    else:
        console.note(f'the model is in `{model}`; try it: glm fill -m {model} "The sky is [MASK]."')


class _Silent:
    """A progress bar that nobody sees."""

    label = ""
    done = 0

    def advance(self, count: int) -> None: ...

    def close(self) -> None: ...


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """A list that the first Ctrl-C fills, so that a step ends and is saved; the second one interrupts as usual."""
    interrupted: list[bool] = []

    def first(*_: object) -> None:
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.note("finishing the step; press Ctrl-C again to stop without saving")

    before = signal.signal(signal.SIGINT, first)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _toml(path: Path) -> str:
    import json

    return json.dumps(str(path), ensure_ascii=False)  # a TOML string
