"""`glm bench`: how fast a model is on this machine, and how near to what the machine can do."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openglm.bundled import bundled_models, existing_path
from openglm.cli import console, options
from openglm.cli.models import model_folder
from openglm.cli.plan import model_config
from openglm.config import PRESETS, ModelConfig, QuantizationScheme
from openglm.errors import InputError
from openglm.storage import atomic_write, total_memory

if TYPE_CHECKING:
    import torch

    from openglm.inference.engine import Engine

EXAMPLES = r"""
[bold]Examples[/bold]

  glm bench

  glm bench ./nano-int8 --batch 1,4,16 --prompt 128 --plot speed.png

  glm bench 335m --random --bits 4 --group 128 --head-bits 4 --json

  glm bench 130b --random --bits 4 --device cuda
"""
_Option = typer.Option


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Bundled name or model folder; with --random a preset.",
            autocompletion=options.complete_model,
        ),
    ] = "nano",
    random: Annotated[bool, _Option("--random", help="Random weights in the shape of MODEL, made on the device.")] = False,
    bits: Annotated[
        int | None, _Option(metavar="N", help="Matrices in 8 or 4 bits, of a plain model as they are read.")
    ] = None,
    group: Annotated[int | None, _Option(metavar="N", help="With --bits: columns a scale; else a row.")] = None,
    head_bits: Annotated[int | None, _Option(metavar="N", help="With --bits: of embedding and head.")] = None,
    dtype: Annotated[
        str | None,
        _Option(
            metavar="TYPE", help="Of what is not quantized.", show_default="float32 on a CPU, float16 or as stored elsewhere"
        ),
    ] = None,
    device: Annotated[
        str | None, _Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one")
    ] = None,
    batch: Annotated[str, _Option(metavar="N,N,...", help="Rows side by side.")] = "1,4,8",
    prompt: Annotated[str, _Option(metavar="N,N,...", help="Tokens of a prompt.")] = "64,512",
    new: Annotated[int, _Option(metavar="N", help="Tokens that are written behind it.")] = 32,
    rounds: Annotated[int, _Option(metavar="N", help="Of which the median is taken.")] = 3,
    threads: Annotated[int | None, _Option(metavar="N", help="Of the CPU.", show_default="torch's choice")] = None,
    as_json: Annotated[bool, _Option("--json", help="One JSON object.")] = False,
    out: Annotated[Path | None, _Option(metavar="FILE", help="Write that object here, too.")] = None,
    plot: Annotated[Path | None, _Option(metavar="FILE", help="A PNG of all speeds; needs the extra `watch`.")] = None,
) -> None:
    """Measure load time, peak memory, and tokens a second of prompts and answers.

    In the same run, the machine's own ceilings: how fast it reads memory, which bounds answers, and how fast it multiplies
    matrices, which bounds prompts.
    """
    for name, value in (("new", new), ("rounds", rounds), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise InputError(f"`--{name}` must be at least 1, not {value}", key=name)
    if threads is not None and threads > (os.cpu_count() or threads):
        raise InputError(f"`--threads` is {threads}, but this machine has {os.cpu_count()} cores", key="threads")
    batches, lengths = _numbers("batch", batch), _numbers("prompt", prompt)
    config = _config(model, random, bits, group, head_bits)
    if lengths[-1] + new > config.max_sequence_length:
        raise InputError(
            f"prompts of {lengths[-1]:,} tokens and {new:,} new ones exceed the context of {config.max_sequence_length:,}",
            key="prompt",
        )
    _check_files(out, plot)
    from openglm.checkpoints import resolve_device
    from openglm.checkpoints.layout import resolve_dtype
    from openglm.evaluation.ceilings import machine
    from openglm.evaluation.speed import Case, load_engine, measure, random_engine, weight_bytes

    place = resolve_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "float16" if random else None)
    if dtype is not None:
        resolve_dtype(dtype)
    _refuse_too_large(config, dtype or "float16", place, batches[-1], lengths[-1] + new)
    cases = [Case(rows, length) for rows in batches for length in lengths]
    with _threads(threads), console.progress(1 + len(cases) * (1 + rounds), "loading") as bar:
        if random:
            engine, notes, seconds = random_engine(config, resolve_dtype(dtype or "float16"), place)
        else:
            loading = {"dtype": dtype, "bits": bits, "group": group, "head_bits": head_bits}
            engine, notes, seconds = load_engine(model_folder(model), place, **loading)
        for note in notes:
            console.note(f"note: {note}")
        bar.label = "measuring"
        bar.advance()
        speed = measure(engine, cases, new, rounds, bar.advance)
        facts = machine(place)
    given = {
        "bits": bits,
        "group": group,
        "head-bits": head_bits,
        "dtype": dtype,
        "device": place.type if device is None else device,
    }
    given |= {"batch": batch, "prompt": prompt, "new": new, "rounds": rounds, "threads": facts["threads"]}
    found = {
        "date": datetime.date.today().isoformat(),
        "command": _command(model, random, given),
        "machine": {**facts, "kernels": _kernels(engine)},
        "model": {
            "name": model,
            "random": random,
            "parameters": config.parameter_count,
            "weights": _form(engine),
            "weight_bytes": weight_bytes(engine.network),
        },
        "load_seconds": seconds,
        "new": new,
        "rounds": rounds,
        **speed.to_dict(),
    }
    if out is not None:
        with atomic_write(out, "w") as file:
            file.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if plot is not None:
        _draw(found, plot)
    if as_json:
        console.write_json(found)
    else:
        console.write("\n".join(_table(found)))


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def _numbers(name: str, text: str) -> list[int]:
    """The numbers of "1,4,8", ascending, each once."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    least = 3 if name == "prompt" else 1  # a token, [gMASK] and sop
    if not found or found[0] < least:
        raise InputError(f"`--{name}` takes whole numbers of at least {least}, as in {least},8,64, not `{text}`", key=name)
    return found


def _config(model: str, random: bool, bits: int | None, group: int | None, head_bits: int | None) -> ModelConfig:
    """The shape and the scheme of what is to be measured."""
    if random:
        config = model_config(model)
    else:
        if model in PRESETS and model not in bundled_models() and existing_path(model) is None:
            raise InputError(f"`{model}` is a shape without weights", hint="add --random", key="model")
        folder = model_folder(model)
        from openglm.checkpoints import open_model

        config = open_model(folder).config
    with options.as_options():
        return config.quantized(QuantizationScheme.of(bits, group, head_bits))


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Raise now what would be raised at the end, after the long part."""
    for name, path in (("out", out), ("plot", plot)):
        if path is not None and path.is_dir():
            raise InputError(f"`--{name}` names the folder `{path}`, not a file", key=name)
    if plot is not None:
        from openglm.training.report.lines import LIGHT, drawing

        with drawing(LIGHT):
            pass


def _refuse_too_large(config: ModelConfig, dtype: str, place: torch.device, batch: int, context: int) -> None:
    import torch

    from openglm.planning.inference import Use, estimate, verdict

    gpu = place.type == "cuda"
    memory = torch.cuda.get_device_properties(place).total_memory if gpu else total_memory()
    cache = "float16" if config.quantization is not None else dtype
    use = Use(dtype, cache, context=context, batch=batch, device="gpu" if gpu else "cpu")
    fits, sentence = verdict(estimate(config, use), memory)
    if not fits:
        alone = batch > 1 and estimate(config, dataclasses.replace(use, batch=1)).total <= memory
        hint = f"that is for {batch} rows side by side; `--batch 1` would fit" if alone else None
        raise InputError(sentence, hint=hint, key="model")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch on so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# What was found


def _command(model: str, random: bool, given: dict[str, Any]) -> str:
    """The command that asks for the same again, defaults included."""
    words = ["glm", "bench", model, *(["--random"] if random else [])]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _kernels(engine: Engine) -> str | None:
    """The compiled CPU kernels that ran, by their variant."""
    from openglm.kernels.cpu.library import variant

    return None if engine.kernel is None or engine.device.type != "cpu" else variant()


def _form(engine: Engine) -> str:
    dtype, scheme = str(engine.dtype).removeprefix("torch."), engine.config.quantization
    return dtype if scheme is None else f"{scheme}; the rest in {dtype}"


def _table(found: dict[str, Any]) -> list[str]:
    """Lines for a terminal of 80 columns."""
    model, machine, ceilings, peak = found["model"], found["machine"], found["ceilings"], found["peak_memory"]
    read, product = (ceilings[name]["median"] for name in ("read_bytes_per_second", "product_flops_per_second"))
    held = "" if peak["bytes"] is None else f"; at most {_unit(peak['bytes'], 'B')} held by {peak['of']}"
    made = "made" if model["random"] else "loaded"
    answers = f"answers of {found['new']} tokens"
    lines = [
        f"{model['name']}: {model['parameters']:,} parameters, {_unit(model['weight_bytes'], 'B')}",
        f"{'random weights, ' if model['random'] else ''}{model['weights']}",
        f"{_machine(machine)}, torch {machine['torch']}",
        f"{made} in {found['load_seconds']:.2f} s{held}",
        f"ceilings: products {_unit(product, 'FLOP/s')} ({ceilings['product_dtype']}), reading {_unit(read, 'B/s')}",
        "",
        f"{'':15}{'prompts':^30}   {answers:^30}",
        f"{'batch':>5} {'prompt':>8}"
        f"  {'tokens/s':>9} {'FLOP/s':>9} {'of ceiling':>10}   {'tokens/s':>9} {'read/s':>9} {'of ceiling':>10}",
    ]
    lines[-2:] = [console.paint(line.rstrip(), "bold", sys.stdout) for line in lines[-2:]]
    for row in found["rows"]:
        lines.append(
            f"{row['batch']:>5} {row['prompt']:>8}"
            f"  {_short(row['prefill_tokens_per_second']['median']):>9} {_unit(row['prefill_flops_per_second'], ''):>9}"
            f" {row['of_products']:>10.0%}"
            f"   {_short(row['decode_tokens_per_second']['median']):>9} {_unit(row['decode_bytes_per_second'], 'B'):>9}"
            f" {row['of_bandwidth']:>10.0%}"
        )
    return lines


def _machine(facts: dict[str, Any]) -> str:
    """Its name and what of it was used."""
    if facts["device"] != "cpu":
        return facts["name"]
    kernels = f", {facts['kernels']} kernels" if facts["kernels"] else ""
    return f"{facts['name']}, {facts['threads']} thread{'' if facts['threads'] == 1 else 's'}{kernels}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def _unit(value: float, unit: str) -> str:
    """With a decimal prefix: 82.1 MB, 1.2 TFLOP/s."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:,.3g} {prefix}{unit}" if value < 100 else f"{value:,.0f} {prefix}{unit}"


def _draw(found: dict[str, Any], path: Path) -> None:
    """Two panels: answers over the batch size, prompts over their length, each with what the ceilings would allow."""
    import numpy as np

    from openglm.training.report.lines import LIGHT, Series, draw_lines, drawing, figure, fold, legend_below

    model, machine = found["model"], found["machine"]
    panels = (
        ("decode", "batch", "prompt", "rows side by side", "prompts of {:,}", f"Answers of {found['new']} tokens"),
        ("prefill", "prompt", "batch", "tokens of a prompt", "{:,} side by side", "Prompts"),
    )
    with drawing(LIGHT):
        made, drawn = figure(len(panels), shared=False)
        for axes, (task, across, apart, label, name, title) in zip(drawn, panels, strict=True):
            lines: dict[int, list[dict[str, Any]]] = {}
            for row in found["rows"]:
                lines.setdefault(row[apart], []).append(row)
            places = np.asarray(sorted({row[across] for row in found["rows"]}))
            series = [
                Series(name.format(value), places, np.asarray([row[f"{task}_tokens_per_second"]["median"] for row in rows]))
                for value, rows in lines.items()
            ]
            first, rows = next(iter(lines.items()))
            words = f"ceiling, {name.format(first)}" if task == "decode" else "ceiling"
            ceiling = Series(words, places, np.asarray([row[f"{task}_ceiling"] for row in rows]), faint=True)
            axes.set(xlabel=label, ylabel="tokens/s, all rows together", title=title)
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            for part, markers in ((fold(series), True), ([ceiling], False)):
                draw_lines(axes, part, LIGHT, smoothed=False, markers=markers, digits=None, robust=False)
            legend_below(axes)
            axes.set_ylim(0, 1.08 * max(float(one.y.max()) for one in (*series, ceiling)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        made.suptitle(f"{model['name']}, {model['weights']}\n{_machine(machine)}", fontsize=10, x=0.02, ha="left")
        with atomic_write(path) as file:
            made.savefig(file, format="png")
