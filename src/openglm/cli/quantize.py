"""`glm quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openglm.cli import console, options
from openglm.cli.models import model_folder
from openglm.storage import refuse_existing

EXAMPLES = r"""
[bold]Examples[/bold]

  glm quantize nano ./nano-int8 --bits 8

  glm quantize ./glm-130b ./glm-130b-int4 --bits 4 --group 128

  glm quantize nano ./nano-int4 --bits 4 --group 128 --text README.md
"""


def quantize(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Model folder or bundled name.", autocompletion=options.complete_model),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
    bits: Annotated[int, typer.Option(metavar="N", help="8 or 4.")],
    group: Annotated[
        int | None, typer.Option(metavar="N", help="Columns that share a scale: 32, 64 or 128; without it a whole row does.")
    ] = None,
    clip: Annotated[bool, typer.Option("--clip", help="Search the range of each group for the least error.")] = False,
    zero_point: Annotated[bool, typer.Option("--zero-point", help="Let the codes of each group have their own zero.")] = False,
    head_bits: Annotated[
        int | None, typer.Option(metavar="N", help="8 or 4 for the embedding, which is also the head; else it stays as it is.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to measure bits per byte on, before and after.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Store a model's matrices in 8 or 4 bits.

    Norms and biases stay as they are, and so does the embedding without --head-bits. TARGET appears whole or not at all;
    memory holds one tensor at a time.
    """
    refuse_existing(target)
    from openglm.config import QuantizationScheme

    scheme = QuantizationScheme(bits, group, zero_point, clip, head_bits)
    folder = model_folder(source)
    from openglm.checkpoints import convert_source, open_model

    documents = _documents(text) if text else []
    opened = open_model(folder)
    with console.progress(None, "quantizing") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        errors = convert_source(opened, target, dtype=None, scheme=scheme, progress=progress)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (folder, target)]
    found: dict[str, Any] = {
        "target": str(target),
        "bytes": {"before": sizes[0], "after": sizes[1]},
        "relative_errors": {error.name: round(error.relative_error, 6) for error in errors},
    }
    if documents:
        with console.progress(2, "measuring bits per byte") as bar:
            measured = []
            for path in (folder, target):
                measured.append(_bits_per_byte(path, documents))
                bar.advance(1)
        found["bits_per_byte"] = dict(zip(("before", "after"), measured, strict=True))
    if as_json:
        console.write_json(found)
        return
    console.note(f"{sizes[0]:,} bytes before, {sizes[1]:,} after: `{target}`")
    worst = sorted(errors, key=lambda error: error.relative_error)
    middle = worst[len(worst) // 2]
    console.note(
        f"relative error of a matrix: {middle.relative_error:.2%} in the middle, {worst[-1].relative_error:.2%} at most"
    )
    console.note(f"  at most: `{worst[-1].name}`")
    if documents:
        before, after = measured
        console.note(f"bits per byte: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")


def _documents(files: list[Path]) -> list[str]:
    from openglm.data.readers import read_documents

    return [document.text for document in read_documents(files)]


def _bits_per_byte(folder: Path, documents: list[str]) -> float:
    import numpy as np

    from openglm import load
    from openglm.errors import InputError
    from openglm.training.validation import bits_per_byte, network_losses

    glm = load(folder)
    tokenizer = glm.tokenizer
    if tokenizer is None:
        raise InputError(f"`{folder}` has no tokenizer, so it cannot be measured on text", hint="leave --text out")
    ids = (np.asarray(tokenizer.encode(text), dtype=np.int64) for text in documents)
    return bits_per_byte(network_losses(glm.network, glm.engine.device), ids, tokenizer)
