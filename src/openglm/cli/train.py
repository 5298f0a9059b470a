"""`glm train`: a recipe becomes a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
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

  glm train recipes/130b.toml --dry-run

  glm train recipes/1.3b.toml --smoke --out runs/smoke

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
    plain: Annotated[bool, typer.Option("--plain", help="On a terminal, one line of progress instead of the view.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the network on the meta device, print layout, memory and time, and stop.")
    ] = False,
    gpus: Annotated[
        str | None, typer.Option(metavar="NODESxGPUS", help="With --dry-run: the GPUs.", show_default="what the layout takes")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="With --dry-run: their kind, as in glm plan.")] = "a100-40",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run the recipe's code path for some steps at a tiny size, on made-up text.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a logged step.")] = False,
) -> None:
    """Train a model.

    The same command goes on from the newest snapshot after an interruption.
    """
    console.one_voice()
    if resume and fresh:
        raise InputError("`--resume` and `--fresh` exclude each other", hint="give one of them")
    if stop_after is not None and not stop_after > 0:
        raise InputError(f"`--stop-after` must be above 0 seconds, not {stop_after:g}")
    from openglm.training.recipe import read_recipe

    paths = [("data.corpus", data), ("data.tokenizer", tokenizer)]
    given = [f"{key}={_toml(path)}" for key, path in paths if path is not None]
    read = read_recipe(recipe, [*(changes or []), *given])
    if dry_run:
        _dry_run(read, gpus, gpu, as_json)
        return
    run = out or Path("runs") / (f"{recipe.stem}-smoke" if smoke else recipe.stem)
    if smoke:
        from openglm.training.smoke import smoke_recipe

        # Every process makes the same text in a folder of its own, so that none reads what another still writes.
        made = run / "made" / os.environ.get("RANK", "0")
        read = smoke_recipe(read, made, int(os.environ.get("WORLD_SIZE", "1")))
    if resume and not any((run / "snapshots").glob("*")):
        raise InputError(f"`{run}` holds no snapshot to resume from", hint="leave --resume out to begin the run")
    from openglm.checkpoints import resolve_device
    from openglm.training.run import train as run_training

    resolve_device(read.run.device)  # told before the data is prepared

    lead = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
    with _progress(read, run, plain=plain, as_json=as_json) if lead else nullcontext(_Silent()) as shown:

        def watch(progress: Any, result: Any, speed: float) -> None:
            shown.watch(progress, result, speed)
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
            shown.close()
            console.note(f"interrupted; the same command goes on from the newest snapshot in `{run}`")
        if interrupted:
            raise typer.Exit(130)
    if not lead:
        return
    if as_json:
        console.write_json({"model": str(model)})
    else:
        mask = read.objectives.masks[0]
        fills = f'glm fill -m {model} "The sky is {mask}."'
        example = f'glm generate -m {model} "Once upon a time"' if mask == "[gMASK]" else fills
        console.note(f"the model is in `{model}`; try it: {example}")


def _dry_run(recipe: Any, gpus: str | None, gpu: str, as_json: bool) -> None:
    from openglm.planning import Cluster, paper_efficiency, report
    from openglm.planning.hardware import find_gpu, parse_gpus
    from openglm.training.dry_run import layout_of, plan_of, stages

    nodes, each = parse_gpus(gpus) if gpus else (0, 0)
    layout = layout_of(recipe, nodes * each or None)
    if not gpus:
        each = min(layout.world_size, 8)
        nodes = -(-layout.world_size // each)
    shapes = stages(recipe, layout)
    plan = plan_of(recipe, layout, Cluster(nodes, each, find_gpu(gpu)), paper_efficiency())
    config = recipe.model.config()
    window = plan.workload.sequence
    tokens = recipe.run.samples * window
    budget = plan.budget(tokens=tokens)
    if as_json:
        found = [{"layers": [s.layers.start, s.layers.stop], "parameters": s.parameters} for s in shapes]
        head = {"parameters": config.parameter_count, "stages": found, "samples": recipe.run.samples}
        console.write_json({**head, **report.plan_values(plan, budget)})
        return
    lines = [
        f"{config.parameter_count:,} parameters, built on the meta device; {layout}: {layout.world_size:,} processes",
        f"{recipe.run.samples:,} samples of at most {window:,} tokens, {recipe.run.batch_size:,} a step, "
        f"{recipe.run.precision}",
        "",
        "stage  layers     parameters",
        *(f"{n:5}  {s.layers.start:>3} to {s.layers.stop - 1:<3} {s.parameters:>14,}" for n, s in enumerate(shapes)),
        "",
        *report.describe_plan(plan, budget),
    ]
    console.write("\n".join(lines))


class _Silent:
    """A view that nobody sees."""

    def watch(self, progress: Any, result: Any, speed: float) -> None: ...

    def close(self) -> None: ...


class _Bar(_Silent):
    """One line of progress."""

    def __init__(self, bar: console.Progress) -> None:
        self._bar = bar

    def watch(self, progress: Any, result: Any, speed: float) -> None:
        self._bar.label = f"loss {result.loss:.3f}, {speed:,.0f} tokens/s"
        self._bar.advance(progress.samples - self._bar.done)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def _progress(read: Any, run: Path, *, plain: bool, as_json: bool) -> Iterator[Any]:
    """The view where a person looks and nothing else is written there; else one line, or nothing."""
    to_stdout = console.is_terminal(sys.stdout)
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    if plain or dumb or not console.is_terminal(sys.stderr) or (as_json and to_stdout):
        with console.progress(read.run.samples, "samples") as bar:
            yield _Bar(bar)
        return
    from openglm.cli.train_view import TrainView

    view = TrainView(read, run, to_stdout=to_stdout)
    try:
        yield view
    finally:
        view.close()


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
