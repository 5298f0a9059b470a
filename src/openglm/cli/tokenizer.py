"""`glm tokenizer`: make a tokenizer, and look at what one does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openglm.cli import console, options
from openglm.cli.batch import read_text
from openglm.errors import InputError, StorageError

if TYPE_CHECKING:
    from openglm.tokenizers import Tokenizer

app = typer.Typer(help="Train a tokenizer, encode and decode.", no_args_is_help=True, rich_markup_mode="rich")

TRAIN = r"""
[bold]Examples[/bold]

  glm tokenizer train README.md README.zh.md --out small.model --vocab-size 1000

  glm tokenizer train corpus/ --out unigram.model --share zh-law=0.25
"""
ENCODE = r"""
[bold]Examples[/bold]

  glm tokenizer encode "The sky is blue. 天空是蓝色的。"

  glm tokenizer encode "The sky is blue." --json
"""
DECODE = r"""
[bold]Examples[/bold]

  glm tokenizer decode 300 301 302

  glm tokenizer encode "The sky" | glm tokenizer decode
"""

_From = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL|FILE",
        help="Bundled name, model folder, or tokenizer file.",
        autocompletion=options.complete_model,
    ),
]


@app.command("train", epilog=TRAIN)
def train(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Files or folders: .jsonl, .jsonl.zst, .txt.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new tokenizer.")],
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Pieces, special tokens and bytes included.")] = 16_384,
    max_lines: Annotated[int, typer.Option(metavar="N", help="Lines that are drawn for training; bounds time and memory.")] = (
        1_000_000
    ),
    share: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=X", help="Use this share (0 to 1) of a source; NAME is a file's name, or a pattern."),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="CPU threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Train a lossless unigram tokenizer (SentencePiece, byte fallback).

    Files of a folder that are called validation* are left out, as in training.
    """
    shares = dict(map(_share, share or []))
    smallest = 300  # 11 special tokens, 256 bytes, the newline, and some pieces
    for option, value, least in (("vocab-size", vocab_size, smallest), ("max-lines", max_lines, 1), ("threads", threads, 1)):
        if value < least:
            raise InputError(f"`--{option}` must be at least {least}, not {value}")
    if out.exists():
        raise StorageError(f"`{out}` exists", hint="remove it, or choose another --out", path=out)
    from openglm.data.readers import find_files, thin_out
    from openglm.tokenizers.unigram import train_unigram

    paths = [path for path in find_files(files) if path in files or not path.name.startswith("validation")]
    with console.progress(None, "reading") as bar:

        def texts() -> Iterator[str]:
            for document in thin_out(paths, shares):
                bar.advance()
                yield document.text
                if document.answer:
                    yield document.answer
            bar.label = "training"
            bar.advance(0)

        made = train_unigram(texts(), out, vocab_size=vocab_size, max_lines=max_lines, threads=threads, log=console.note)
    if as_json:
        console.write_json({"file": str(out), "vocab_size": made.vocab_size, "documents": bar.done})
    else:
        console.note(f"{made.vocab_size:,} pieces from {bar.done:,} documents: `{out}`")


def _share(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not name or not 0 <= share <= 1:
        raise InputError(f"`--share {text}` is not of the form NAME=X with X from 0 to 1")
    return name, share


@app.command("encode", epilog=ENCODE)
def encode(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Without it: stdin.", show_default=False)] = None,
    model: _From = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with ids and pieces.")] = False,
) -> None:
    """Ids of a text, on one line."""
    tokenizer = _load(model)
    text = read_text("a text") if text is None else text
    ids = tokenizer.encode(text)
    if as_json:
        console.write_json({"ids": ids, "pieces": [tokenizer.decode([i]) for i in ids]})
    else:
        console.write(" ".join(map(str, ids)))


@app.command("decode", epilog=DECODE)
def decode(
    ids: Annotated[list[str] | None, typer.Argument(metavar="IDS...", help="Without them: stdin.", show_default=False)] = None,
    model: _From = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Text of ids."""
    tokenizer = _load(model)
    numbers: list[int] = []
    for word in " ".join(ids or [read_text("ids")]).replace(",", " ").split():
        try:
            numbers.append(int(word))
        except ValueError as error:
            raise InputError(f"an id is a whole number, not {word!r}", hint="for one: glm tokenizer decode 300 301") from error
    text = tokenizer.decode(numbers)
    if as_json:
        console.write_json({"ids": numbers, "text": text})
    else:
        console.write(console.printable(text, sys.stdout))


def _load(model: str) -> Tokenizer:
    from openglm.cli.models import model_folder
    from openglm.tokenizers import load_tokenizer

    return load_tokenizer(model_folder(model))
