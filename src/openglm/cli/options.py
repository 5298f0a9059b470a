"""The options that `glm fill` and `glm generate` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from openglm.cli.models import complete_model
from openglm.errors import OpenGLMError

_MODEL, _SEARCH, FILES = "Model", "Search", "Input and output"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Bundled name, model folder, or hub id with --download.",
        autocompletion=complete_model,
        rich_help_panel=_MODEL,
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch MODEL from the Hugging Face hub.", rich_help_panel=_MODEL)]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps ...", rich_help_panel=_MODEL)]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="float32, bfloat16 or float16; default float32 on a CPU, the checkpoint's elsewhere.",
        autocompletion=lambda incomplete: [d for d in ("float32", "bfloat16", "float16") if d.startswith(incomplete)],
        rich_help_panel=_MODEL,
    ),
]

Bits = Annotated[
    int | None,
    typer.Option(
        metavar="8|4",
        help="Quantize the layers as they are read; a bundled model on a CPU with compiled kernels is in 8 anyway.",
        rich_help_panel=_MODEL,
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="With --bits: columns that share a scale, 32, 64 or 128; else a row.", rich_help_panel=_MODEL
    ),
]
HeadBits = Annotated[
    int | None, typer.Option(metavar="8|4", help="With --bits: of embedding and head; else they stay.", rich_help_panel=_MODEL)
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Keep keys and values in float32, float16, bfloat16 or int8; else as the model computes, quantized: float16.",
        autocompletion=lambda incomplete: [d for d in ("float32", "float16", "bfloat16", "int8") if d.startswith(incomplete)],
        rich_help_panel=_MODEL,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|lookup",
        help="Same answers, sooner: a smaller model proposes them, or what stands in the text already does.",
        autocompletion=complete_model,
        rich_help_panel=_MODEL,
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="auto|host|disk",
        help="Layers that do not fit stay in host memory or on disk, and are copied as they are needed.",
        autocompletion=lambda incomplete: [place for place in ("auto", "host", "disk") if place.startswith(incomplete)],
        rich_help_panel=_MODEL,
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        metavar="GB",
        help="With --offload: what the model may take on the device.",
        show_default="all but a reserve",
        rich_help_panel=_MODEL,
    ),
]

MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Longest answer in tokens (64).", rich_help_panel=_SEARCH)]
MinTokens = Annotated[int | None, typer.Option(metavar="N", help="Shortest answer in tokens.", rich_help_panel=_SEARCH)]
NumBeams = Annotated[int | None, typer.Option(metavar="N", help="Beam search with N beams.", rich_help_panel=_SEARCH)]
LengthPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Of beam search; larger favours longer.", rich_help_panel=_SEARCH)
]
NoRepeat = Annotated[
    int | None,
    typer.Option("--no-repeat-ngram-size", metavar="N", help="No run of N tokens twice.", rich_help_panel=_SEARCH),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="X", help="Draw the tokens; lower is safer.", rich_help_panel=_SEARCH),
]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Draw from the N likeliest.", rich_help_panel=_SEARCH)]
TopP = Annotated[
    float | None, typer.Option(metavar="X", help="Draw from the likeliest that make up X.", rich_help_panel=_SEARCH)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Above 1 avoids tokens that stand already.", rich_help_panel=_SEARCH)
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Same seed, same text.", rich_help_panel=_SEARCH)]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End an answer before this; may be repeated.", rich_help_panel=_SEARCH),
]

Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        "-i",
        metavar="FILE|-",
        help='One text a line, or JSON lines with "text" and, if you like, "id".',
        rich_help_panel=FILES,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.jsonl",
        help="Write JSON lines here; the same command goes on after an interruption.",
        rich_help_panel=FILES,
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Texts of --input that are answered at once.", rich_help_panel=FILES)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a text.", rich_help_panel=FILES)]


_LOADING = ("device", "dtype", "bits", "group", "head_bits", "cache_dtype", "draft", "offload", "memory")
_SETTINGS = (
    "max_tokens",
    "min_tokens",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop",
)


def loading(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's parameters those of ``load`` that were given; it has defaults for the others."""
    return {name: params[name] for name in _LOADING if params[name] is not None}


def settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's parameters those of ``SamplingSettings`` that were given; it has defaults for the others."""
    found = {name: params[name] for name in _SETTINGS if params[name] not in (None, (), [])}
    return {**found, "stop": tuple(found["stop"])} if "stop" in found else found


@contextmanager
def as_options() -> Iterator[None]:
    """Names an option as it is typed: ``num_beams`` in an ``OpenGLMError`` of that key becomes ``--num-beams``."""
    try:
        yield
    except OpenGLMError as error:
        for name in {error.key, "bits"} if error.key else ():
            typed = f"`--{str(name).replace('_', '-')}`"
            error.message = error.message.replace(f"`{name}`", typed)
            error.hint = error.hint and error.hint.replace(f"`{name}`", typed)
        raise
