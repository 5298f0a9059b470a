"""`glm quantize`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openglm.cli import console, options
from openglm.cli.models import model_folder
from openglm.errors import InputError
from openglm.storage import refuse_existing

if TYPE_CHECKING:
    from openglm.checkpoints import ModelSource
    from openglm.data.readers import Document
    from openglm.quantization.calibration import CalibrationSample
    from openglm.quantization.layers import LayerError

#: Of each language, in the report.
MOST_BLANKS = 50
_HAN = re.compile("[\u4e00-\u9fff]")

EXAMPLES = r"""
[bold]Examples[/bold]

  glm quantize nano ./nano-int8 --bits 8

  glm quantize ./glm-130b ./glm-130b-int4 --bits 4 --group 128

  glm quantize nano ./nano-int4 --bits 4 --group 128 --text README.md

  glm quantize nano ./nano-gptq --bits 4 --group 128 --gptq corpus.txt --text README.md
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
    gptq: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Quantize by GPTQ: so that outputs on this text change least; may be repeated."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="With --gptq: samples of at most 512 tokens that are cut from it (128).")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="With --gptq: which samples (0).")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to measure bits per byte and exact fills on.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A PNG of the errors; needs the extra `watch`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Store a model's matrices in 8 or 4 bits.

    Norms and biases stay as they are, and so does the embedding without --head-bits. TARGET appears whole or not at all;
    memory holds one tensor at a time, with --gptq one layer and the samples' hidden states.
    """
    for name, value in (("samples", samples), ("seed", seed)):
        if value is not None and not gptq:
            raise InputError(f"`--{name}` needs `--gptq`", key=name)
    refuse_existing(target)
    from openglm.config import QuantizationScheme

    if plot is not None:
        from openglm.training.report.lines import LIGHT, drawing

        with drawing(LIGHT):  # raises before the long part where matplotlib is missing
            pass
    scheme = QuantizationScheme(bits, group, zero_point, clip, head_bits)
    folder = model_folder(source)
    from openglm.checkpoints import convert_source, open_model

    documents = _documents(text) if text else []
    opened = open_model(folder)
    calibration = _calibration(opened, gptq, samples, seed) if gptq else []
    with console.progress(None, "quantizing") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        errors = convert_source(opened, target, dtype=None, scheme=scheme, progress=progress, calibration=calibration)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (folder, target)]
    found: dict[str, Any] = {
        "target": str(target),
        "bytes": {"before": sizes[0], "after": sizes[1]},
        "relative_errors": {error.name: round(error.relative_error, 6) for error in errors},
    }
    if calibration:
        found["calibration"] = {"samples": len(calibration), "tokens": sum(len(sample.tokens) for sample in calibration)}
        found["output_errors"] = {
            error.name: {"nearest": round(error.nearest_output_error, 6), "gptq": round(error.output_error, 6)}
            for error in errors
            if error.nearest_output_error is not None and error.output_error is not None
        }
    if documents:
        with console.progress(2, "measuring") as bar:
            for when, path in (("before", folder), ("after", target)):
                for name, value in _measure(path, documents).items():
                    found.setdefault(name, {})[when] = value
                bar.advance(1)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        console.write_json(found)
        return
    _show(found, errors)


def _show(found: dict[str, Any], errors: list[LayerError]) -> None:
    """Sizes, a row of errors for each layer, and what was measured."""
    size = found["bytes"]
    console.note(f"{size['before']:,} bytes before, {size['after']:,} after: `{found['target']}`")
    console.note("relative error of the weights, %")
    _show_layers({error.name: f"{100 * error.relative_error:.3f}" for error in errors})
    if "calibration" in found:
        samples = found["calibration"]
        console.note(
            f"relative error of the products with {samples['samples']} samples ({samples['tokens']:,} tokens), %: "
            "rounded to nearest > GPTQ"
        )
        pairs = found["output_errors"].items()
        _show_layers({name: f"{100 * pair['nearest']:.3f} > {100 * pair['gptq']:.3f}" for name, pair in pairs})
    if "bits_per_byte" in found:
        before, after = found["bits_per_byte"]["before"], found["bits_per_byte"]["after"]
        console.note(f"bits per byte: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
        before, after = found["exact_fills"]["before"], found["exact_fills"]["after"]
        console.note(f"blanks filled exactly: {before['exact']} before, {after['exact']} after, of {before['blanks']}")


def _show_layers(cells: dict[str, str]) -> None:
    """A table of what is said of each matrix: a row a layer."""
    rows: dict[str, dict[str, str]] = {}
    for name, cell in cells.items():
        layer, _, matrix = name.removeprefix("layers.").partition(".")
        rows.setdefault(layer if matrix else "", {})[matrix.rpartition(".")[2] or layer] = cell
    columns = list(rows.get("0", {}))
    console.note(f"{'layer':>5}  " + "  ".join(f"{name:>16}" for name in columns))
    for layer, row in rows.items():
        if layer:
            console.note(f"{layer:>5}  " + "  ".join(f"{row[name]:>16}" for name in columns))
        else:
            console.note(f"word_embeddings: {next(iter(row.values()))}")


def _documents(files: list[Path]) -> list[Document]:
    from openglm.data.readers import read_documents

    return list(read_documents(files))


def _calibration(source: ModelSource, files: list[Path], count: int | None, seed: int | None) -> list[CalibrationSample]:
    from openglm.data.calibration import SAMPLES, calibration_samples
    from openglm.tokenizers import load_tokenizer

    if source.tokenizer_path is None:
        raise InputError("this model has no tokenizer, so it cannot be calibrated on text")
    tokenizer = load_tokenizer(source.tokenizer_path)
    return calibration_samples(files, tokenizer, source.config, SAMPLES if count is None else count, seed or 0)


def _measure(folder: Path, documents: list[Document]) -> dict[str, Any]:
    """Bits per byte of all texts, and blanks in them that are filled exactly."""
    import numpy as np

    from openglm import load
    from openglm.evaluation.blanks import count_exact, draw_blanks, fill_blanks, is_exact, tokenizer_of
    from openglm.training.validation import bits_per_byte, network_losses

    glm = load(folder)
    tokenizer = tokenizer_of(glm)
    ids = (np.asarray(tokenizer.encode(document.text), dtype=np.int64) for document in documents)
    bits = bits_per_byte(network_losses(glm.network, glm.engine.device), ids, tokenizer)
    by_language: dict[str, list[Document]] = {}
    for document in documents:
        chinese = len(_HAN.findall(document.text)) > 0.1 * len(document.text)
        by_language.setdefault("zh" if chinese else "en", []).append(document)
    blanks = draw_blanks(by_language, tokenizer, MOST_BLANKS, exactly=False)
    exact = [is_exact(blank, *answer, tokenizer) for blank, answer in zip(blanks, fill_blanks(glm, blanks), strict=True)]
    return {"bits_per_byte": bits, "exact_fills": count_exact(blanks, exact)["by_language"]["all"]}


def _draw(found: dict[str, Any], path: Path) -> None:
    """The errors of all matrices over the layers, as a picture."""
    import numpy as np

    from openglm.storage import atomic_write
    from openglm.training.report.lines import LIGHT, Series, draw_lines, drawing, figure

    errors: dict[str, list[float]] = {}
    for name, error in found["relative_errors"].items():
        if name.startswith("layers."):
            errors.setdefault(name.split(".", 2)[2], []).append(100 * error)
    title = f"{found['bytes']['before'] / 1e6:,.1f} MB before, {found['bytes']['after'] / 1e6:,.1f} MB after"
    if "bits_per_byte" in found:
        bits, fills = found["bits_per_byte"], found["exact_fills"]
        title += f"\nbits per byte {bits['before']:.4f} and {bits['after']:.4f}"
        title += f"; exact fills {fills['before']['exact']} and {fills['after']['exact']} of {fills['before']['blanks']}"
    with drawing(LIGHT):
        made, (axes,) = figure()
        series = [Series(name, np.arange(len(values)), np.asarray(values)) for name, values in errors.items()]
        axes.set(xlabel="layer", ylabel="relative error of the weights, %", title=title)
        draw_lines(axes, series, LIGHT, smoothed=False, markers=True, robust=False)
        axes.set_ylim(0, 1.1 * max(max(values) for values in errors.values()))
        axes.xaxis.get_major_locator().set_params(integer=True)
        with atomic_write(path) as file:
            made.savefig(file, format="png")
