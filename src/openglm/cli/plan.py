"""`glm plan`: what a training run needs, and which layouts fit."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openglm.bundled import existing_path
from openglm.cli import console
from openglm.config import PRESETS, ModelConfig
from openglm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from openglm.planning import Cluster, Efficiency, Workload

EXAMPLES = r"""
[bold]Examples[/bold]

  glm plan --model 130b --gpus 96x8 --gpu a100-40 --batch 4224 --precision fp16 --tensor 4 --pipeline 8

  glm plan --model 10b --gpus 8 --gpu h200 --tokens 200B --price 3

  glm plan --model 130b --gpus 96x8 --memory 40 --batch 4224 --precision fp16

  glm plan --model 110m --cpu --sequence 512 --micro-batch 4
"""
_MODEL, _MACHINE, _LAYOUT, _RUN = "Model and step", "Machine", "Layout (searched where not given)", "Run"
#: Tokens of a step where no batch is given.
_USUAL_STEP = 4_000_000

_Option = typer.Option


def plan(
    model: Annotated[str, _Option("--model", "-m", metavar="NAME|FOLDER", help="Preset or model.", rich_help_panel=_MODEL)],
    batch: Annotated[
        int | None,
        _Option(metavar="N", help="Samples a step.", show_default="4 M tokens or more", rich_help_panel=_MODEL),
    ] = None,
    sequence: Annotated[
        int | None,
        _Option(metavar="N", help="Tokens a sample.", show_default="the model's context", rich_help_panel=_MODEL),
    ] = None,
    precision: Annotated[
        str | None, _Option(metavar="TYPE", help="bf16, fp16 or fp32.", show_default="bf16", rich_help_panel=_MODEL)
    ] = None,
    attention: Annotated[
        str, _Option(metavar="KIND", help="fused, or scores: stored, as before 2022.", rich_help_panel=_MODEL)
    ] = "fused",
    gpus: Annotated[
        str | None, _Option(metavar="SERVERSxGPUS", help="96x8, or 8 for one server.", rich_help_panel=_MACHINE)
    ] = None,
    gpu: Annotated[
        str | None,
        _Option(
            metavar="NAME",
            help="v100-32, a100-40, a100-80, h100, h200, b200, rtx3090, rtx4090.",
            show_default="a100-40",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    memory: Annotated[float | None, _Option(metavar="GIB", help="Memory of a GPU.", rich_help_panel=_MACHINE)] = None,
    tflops: Annotated[float | None, _Option(metavar="X", help="Peak TFLOP/s of a GPU.", rich_help_panel=_MACHINE)] = None,
    network: Annotated[
        float | None, _Option(metavar="GB/S", help="From a GPU to other servers, one direction.", rich_help_panel=_MACHINE)
    ] = None,
    cpu: Annotated[bool, _Option("--cpu", help="One process on a CPU instead: its memory.", rich_help_panel=_MACHINE)] = False,
    tensor: Annotated[int | None, _Option(metavar="N", help="GPUs that share a matrix.", rich_help_panel=_LAYOUT)] = None,
    pipeline: Annotated[int | None, _Option(metavar="N", help="Stages of layers.", rich_help_panel=_LAYOUT)] = None,
    data: Annotated[int | None, _Option(metavar="N", help="Copies of the model.", rich_help_panel=_LAYOUT)] = None,
    micro_batch: Annotated[
        int | None, _Option(metavar="N", help="Samples in a stage at once.", rich_help_panel=_LAYOUT)
    ] = None,
    zero: Annotated[
        int | None,
        _Option(
            metavar="0-3",
            help="Shared by data ranks: 1 optimizer, 2 gradients, 3 weights (FSDP2: shard after forward).",
            rich_help_panel=_LAYOUT,
        ),
    ] = None,
    recompute: Annotated[
        str | None,
        _Option(
            metavar="KIND",
            help="none: store all; layer: only layer inputs; partitioned: these over tensor ranks.",
            rich_help_panel=_LAYOUT,
        ),
    ] = None,
    top: Annotated[int, _Option(metavar="N", help="Layouts that are shown.", rich_help_panel=_LAYOUT)] = 5,
    calibrate: Annotated[
        list[str] | None,
        _Option(
            metavar="SECONDS@BATCH",
            help="A measured step of this layout; two of different batches fit the overhead, too.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    tokens: Annotated[str | None, _Option(metavar="N", help="Of the whole run: 400B, 1.5T.", rich_help_panel=_RUN)] = None,
    uptime: Annotated[float, _Option(metavar="X", help="Share of the time that trains.", rich_help_panel=_RUN)] = 1.0,
    power: Annotated[
        float | None, _Option(metavar="WATTS", help="Of a GPU.", show_default="its datasheet's", rich_help_panel=_RUN)
    ] = None,
    price: Annotated[float | None, _Option(metavar="X", help="Of a GPU-hour.", rich_help_panel=_RUN)] = None,
    carbon: Annotated[float | None, _Option(metavar="GRAMS", help="CO2 of a kWh.", rich_help_panel=_RUN)] = None,
    as_json: Annotated[bool, _Option("--json", help="One JSON object.")] = False,
) -> None:
    """Memory, step time, energy and cost of a training run, and the layouts that fit.

    Arithmetic only: nothing is loaded and no GPU is needed.
    """
    above_zero = {"memory": memory, "tflops": tflops, "network": network, "power": power, "price": price, "carbon": carbon}
    counts = {"batch": batch, "sequence": sequence, "tensor": tensor, "pipeline": pipeline, "data": data, "top": top}
    for name, value in {**above_zero, **counts, "micro-batch": micro_batch, "uptime": uptime}.items():
        if value is not None and not (0 < value < math.inf):
            raise InputError(f"`--{name}` must be above 0, not {value:g}", key=name)
    if uptime > 1:
        raise InputError(f"`--uptime` is a share, at most 1, not {uptime:g}", key="uptime")
    if attention not in ("fused", "scores"):
        raise InputError(f"`--attention` must be fused or scores, not {attention}", key="attention")
    config = model_config(model)
    sequence = sequence or config.max_sequence_length
    if cpu:
        given = {**above_zero, "gpus": gpus, "gpu": gpu, "tensor": tensor, "pipeline": pipeline, "data": data, "tokens": tokens}
        given |= {"zero": zero, "recompute": recompute, "calibrate": calibrate or None}
        given |= {"attention": None if attention == "fused" else attention}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"`--cpu` plans the memory of one process and takes no `--{name}`", hint="leave one out")
        _process(model, config, sequence, batch, micro_batch or 1, precision or "bf16", as_json)
        return
    if gpus is None:
        raise InputError("`glm plan` needs `--gpus`, how many there are", hint="--gpus 96x8, or --cpu for one process")
    from openglm.planning import Workload, search
    from openglm.planning.timing import paper_efficiency

    cluster = _cluster(gpus, gpu, memory, tflops, network)
    precision = precision or ("bf16" if cluster.gpu.bfloat16 else "fp16")
    # A multiple of the GPUs by a power of 2 divides by every degree of data parallelism and most micro-batches.
    usual = cluster.gpus * 2 ** max(math.ceil(math.log2(_USUAL_STEP / sequence / cluster.gpus)), 0)
    workload = Workload(config, batch or usual, sequence, precision, fused_attention=attention == "fused")
    cluster.gpu.peak_tflops(precision)  # refuses bf16 on a V100
    settings: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "data": data}
    settings |= {"micro_batch": micro_batch, "zero": zero, "recompute": recompute}
    efficiency = paper_efficiency()
    if calibrate:
        settings, efficiency = _calibrated(workload, cluster, settings, calibrate)
    count = _tokens(tokens)
    found = search(workload, cluster, efficiency, **settings)
    shown = found.plans[:top] or ([found.nearest] if found.nearest else [])
    budgets = [plan.budget(watts=power, uptime=uptime, tokens=count, price=price, carbon=carbon) for plan in shown]
    from openglm.planning import report

    if as_json:
        values = [report.plan_values(plan, budget) for plan, budget in zip(shown, budgets, strict=True)]
        console.write_json(
            {
                **_head_values(model, workload),
                "hardware": {"servers": cluster.nodes, "gpus_per_server": cluster.gpus_per_node, **vars(cluster.gpu)},
                "layouts": values if found.plans else [],
                "nearest": None if found.plans else values[0],
                "refused": [vars(refusal) for refusal in found.refused],
            }
        )
        return
    lines = _head(model, workload, batch is None)
    peak = cluster.gpu.peak_tflops(precision)
    assumed = "" if gpu else " (assumed; --gpu names another)"
    lines.append(
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}{assumed}: {cluster.gpus:,} GPUs with "
        f"{cluster.gpu.memory:g} GiB and {peak:g} TFLOP/s {precision}"
    )
    if len(found.plans) > 1:
        lines += ["", f"layouts that fit, fastest first ({len(shown)} of {len(found.plans)})", *report.table(shown)]
    if found.refused and (len(found.plans) != 1 or None in (tensor, pipeline)):
        lines += ["", "layouts that are impossible or do not fit", *report.refusal_lines(found.refused)]
    if not found.plans:
        lines += ["", "no layout fits; this one comes nearest"]
    console.write("\n".join([*lines, "", *report.describe_plan(shown[0], budgets[0])]))


def model_config(model: str) -> ModelConfig:
    """The configuration of a preset, a folder, or a config.json."""
    if model in PRESETS:
        return ModelConfig.preset(model)
    folder = existing_path(model)
    if folder is None:
        try:
            return ModelConfig.preset(model)  # raises, with the nearest name
        except ConfigError as error:
            message = f"there is no model `{model}`: neither a preset nor a folder"
            raise ConfigError(message, hint=error.hint, key="model") from error
    return ModelConfig.from_json(folder / "config.json" if folder.is_dir() else folder)


def _cluster(gpus: str, name: str | None, memory: float | None, tflops: float | None, network: float | None) -> Cluster:
    from openglm.planning.hardware import Cluster, find_gpu, parse_gpus

    gpu = find_gpu(name or "a100-40")
    changes: dict[str, Any] = {"memory": memory, "half_tflops": tflops, "single_tflops": tflops, "network": network}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes:
        changed = ", ".join(f"--{key}" for key in ("memory", "tflops", "network") if key in changes or f"half_{key}" in changes)
        gpu = dataclasses.replace(gpu, source=f"{gpu.source}; {changed} as given", **changes)
    return Cluster(*parse_gpus(gpus), gpu)


def _calibrated(
    workload: Workload, cluster: Cluster, settings: dict[str, Any], texts: list[str]
) -> tuple[dict[str, Any], Efficiency]:
    """All settings of the layout that was measured, and the efficiency that explains its steps."""
    from openglm.planning.layout import Layout, check_layout
    from openglm.planning.timing import calibrate

    measured = []
    for text in texts:
        seconds, _, batch = text.partition("@")
        try:
            measured.append((float(seconds), int(batch.replace(",", ""))))
        except ValueError as error:
            raise InputError(
                f"`--calibrate {text}` is not of the form SECONDS@BATCH", hint="88.5@4224 for one", key="calibrate"
            ) from error
    tensor, pipeline = settings["tensor"], settings["pipeline"]
    if tensor is None or pipeline is None:
        raise InputError(
            "`--calibrate` needs `--tensor` and `--pipeline`, for a measured step belongs to one layout",
            hint="--micro-batch, --zero and --recompute count as 1, 1 and layer where they are not given",
            key="calibrate",
        )
    data = settings["data"] or max(cluster.gpus // max(tensor * pipeline, 1), 1)
    usual = {"micro_batch": 1, "zero": 1, "recompute": "layer"}
    given = {**settings, "data": data} | {key: value for key, value in usual.items() if settings[key] is None}
    layout = Layout(**given)
    check_layout(workload, layout, cluster.gpus)
    return given, calibrate(workload, layout, cluster, measured)


def _tokens(text: str | None) -> float | None:
    """400B, 1.5T, 300M or a plain number."""
    if text is None:
        return None
    size = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        count = float((text[:-1] if size else text).replace(",", "")) * (size or 1)
    except ValueError:
        count = math.nan
    if not 0 < count < math.inf:
        raise InputError(f"`--tokens {text}` is no number of tokens", hint="400B or 1.5T for one", key="tokens")
    return count


def _process(
    model: str, config: ModelConfig, sequence: int, batch: int | None, micro_batch: int, precision: str, as_json: bool
) -> None:
    from openglm.planning import Workload, process_memory, report

    if precision == "fp16":
        raise InputError("on a CPU a run computes in bf16 or fp32, not in fp16", key="precision")
    if batch and batch < micro_batch:
        raise InputError(f"a batch of {batch} is smaller than a micro-batch of {micro_batch}", key="batch")
    workload = Workload(config, batch or 2 * micro_batch, sequence, precision)
    memory = process_memory(workload, micro_batch)
    if as_json:
        console.write_json({**_head_values(model, workload), "micro_batch": micro_batch, **report.process_values(memory)})
        return
    console.write("\n".join([*_head(model, workload, batch is None), "", *report.process_lines(memory)]))


def _head(model: str, workload: Workload, assumed: bool) -> list[str]:
    return [
        f"{model}: {workload.config.parameter_count:,} parameters",
        f"a step: {workload.batch:,} samples{' (assumed)' if assumed else ''} x {workload.sequence:,} tokens = "
        f"{workload.tokens:,} tokens, {workload.precision}",
    ]


def _head_values(model: str, workload: Workload) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": workload.config.parameter_count,
        "batch": workload.batch,
        "sequence": workload.sequence,
        "precision": workload.precision,
        "fused_attention": workload.fused_attention,
        "tokens_per_step": workload.tokens,
        "model_flops_per_step": workload.model_flops,
    }
