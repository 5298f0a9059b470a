"""`glm convert`: a model of any kind that is read here becomes a folder of our own format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openglm.cli import console, options
from openglm.cli.models import model_folder
from openglm.errors import InputError
from openglm.storage import refuse_existing

EXAMPLES = r"""
[bold]Examples[/bold]

  glm convert nano ./nano-float32 --dtype float32

  glm convert ./glm-130b-sat ./glm-130b --tokenizer ./ice_text.model

  glm convert ./glm-130b-sat ./glm-130b-int4 --bits 4 --group 128
"""
_DTYPES = ("float16", "bfloat16", "float32", "keep")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Released checkpoint, model folder, bundled name, or hub id with --download.",
            autocompletion=options.complete_model,
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="float16, bfloat16, float32, or keep.",
            autocompletion=lambda incomplete: [name for name in _DTYPES if name.startswith(incomplete)],
        ),
    ] = "float16",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokenizer to put in; without it the source's own.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A config.json for a source that has none.")] = None,
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="Quantize on the way, to 8 or 4 bits; `glm quantize` reports more.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(metavar="N", help="With --bits: columns that share a scale, 32, 64 or 128; else a row.")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(metavar="N", help="With --bits: of embedding and head, 8 or 4; else they stay.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch SOURCE from the Hugging Face hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Convert a model to openglm's own format.

    TARGET appears whole or not at all. Memory holds a slice of one tensor at a time, so size does not matter.
    """
    if dtype not in _DTYPES:
        raise InputError(f"`--dtype` must be {', '.join(_DTYPES)}, not {dtype!r}")
    from openglm.config import ModelConfig, QuantizationScheme

    with options.as_options():
        scheme = QuantizationScheme.of(bits, group, head_bits)
    refuse_existing(target)
    folder = model_folder(source, download=download)
    given = ModelConfig.from_json(config) if config is not None else None
    if tokenizer is not None:
        from openglm.tokenizers import load_tokenizer

        load_tokenizer(tokenizer)  # a wrong file is told before the long part
    from openglm.checkpoints import convert as run

    with console.progress(None, "converting") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        opened = run(
            folder,
            target,
            dtype=None if dtype == "keep" else dtype,
            config=given,
            tokenizer=tokenizer,
            progress=progress,
            scheme=scheme,
        )
    for line in opened.notes:
        console.note(f"note: {line}")
    size = sum(file.stat().st_size for file in target.iterdir())
    if as_json:
        parameters = opened.config.parameter_count
        console.write_json({"target": str(target), "parameters": parameters, "bytes": size, "notes": list(opened.notes)})
    else:
        console.note(f"{opened.config.parameter_count:,} parameters, {size:,} bytes: `{target}`")
