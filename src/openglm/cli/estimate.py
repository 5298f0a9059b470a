"""`glm estimate`: whether a model fits, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from openglm.bundled import existing_path
from openglm.cli import console, options
from openglm.cli.plan import model_config
from openglm.config import PRESETS, ModelConfig
from openglm.errors import InputError

EXAMPLES = r"""
[bold]Examples[/bold]

  glm estimate 130b --bits 4 --gpu a100-80 --context 2048

  glm estimate ./glm-130b --bits 8 --gpus 4 --gpu rtx3090

  glm estimate nano --cpu
"""


def estimate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Preset, model folder or bundled name.", autocompletion=options.complete_model),
    ],
    bits: Annotated[int | None, typer.Option(metavar="N", help="As if quantized to 8 or 4 bits.")] = None,
    group: Annotated[int | None, typer.Option(metavar="N", help="With --bits: columns a scale; else a row.")] = None,
    head_bits: Annotated[int | None, typer.Option(metavar="N", help="With --bits: of embedding and head.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs that share every matrix.")] = 1,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="a100-40, a100-80, h100, h200, rtx3090, ...")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Memory of a GPU, or with --cpu of the machine.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="On the CPU.")] = False,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens, answer included.", show_default="the model's")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Texts side by side.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of what is not quantized.", show_default="float16; float32 on a CPU")
    ] = None,
    cache: Annotated[str, typer.Option(metavar="TYPE", help="Of keys and values.")] = "float16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say whether a model fits into memory, and if not, what would.

    Arithmetic only. Without --gpu, --memory or --cpu it looks at this machine. Exit code 1: it does not fit.
    """
    from openglm.config import QuantizationScheme
    from openglm.planning import GPUS
    from openglm.planning.inference import Use, estimate, verdict

    config = _config(model)
    with options.as_options():
        config = config.quantized(QuantizationScheme.of(bits, group, head_bits))
    if cpu and gpu is not None:
        raise InputError("`--cpu` and `--gpu` exclude each other", key="gpu")
    if memory is not None and not 0 < memory < 1e6:
        raise InputError(f"`--memory` must be above 0, not {memory:g}", key="memory")
    if gpu is not None and gpu not in GPUS:
        raise InputError(f"there is no GPU `{gpu}` here", hint=f"known: {', '.join(GPUS)}; or give --memory", key="gpu")
    size, device = _memory(gpu, memory, cpu)
    use = Use(
        dtype or ("float32" if device == "cpu" else "float16"),
        cache,
        gpus,
        context or config.max_sequence_length,
        batch,
        device,
    )
    found = estimate(config, use)
    fits, sentence = verdict(found, size)
    if as_json:
        terms = {term.name: round(term.bytes) for term in found.terms}
        console.write_json(
            {"fits": fits, "bytes": round(found.total), "memory": round(size), "terms": terms, "verdict": sentence}
        )
    else:
        width = max(len(term.name) for term in found.terms)
        for term in found.terms:
            console.write(f"{term.name:<{width}}  {term.bytes / 1e9:10.3f} GB  {term.how}")
        console.write(f"{'sum':<{width}}  {found.total / 1e9:10.3f} GB")
        console.write(sentence)
    if not fits:
        raise typer.Exit(1)


def _config(model: str) -> ModelConfig:
    if model in PRESETS or existing_path(model) is None:
        return model_config(model)
    from openglm.checkpoints import open_model
    from openglm.cli.models import model_folder

    return open_model(model_folder(model)).config


def _memory(gpu: str | None, given: float | None, cpu: bool) -> tuple[float, str]:
    """Bytes there are, and on what."""
    from openglm.planning import GPUS

    if given is not None:
        return given * 1e9, "cpu" if cpu else "gpu"
    if gpu is not None:
        return GPUS[gpu].memory * 2**30, "gpu"
    if not cpu:
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.get_device_properties(0).total_memory), "gpu"
    from openglm.storage import total_memory

    return float(total_memory()), "cpu"
