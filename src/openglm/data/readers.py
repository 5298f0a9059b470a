"""Documents from files: JSON lines (plain or zstd), and plain text."""

from __future__ import annotations

import fnmatch
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openglm.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".txt", ".txt.zst")


@dataclass(frozen=True)
class Document:
    """One piece of training data: running text, or an instruction with its answer."""

    text: str
    """The text; of an instruction, its prompt."""
    answer: str | None = None
    """The answer of an instruction; None for running text."""
    id: str = ""
    source: str = ""


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files to read: files as given, folders searched for ``SUFFIXES``. Raises ``DataError`` if there are none."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"there is no file or folder `{path}`", path=path)
    if not files:
        raise DataError("no training text was found", hint=f"give files or folders with {', '.join(SUFFIXES)}")
    return files


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    try:
        with open(path, "rb") as file:
            if path.suffix != ".zst":
                yield file
                return
            try:
                import zstandard
            except ImportError as error:
                raise DataError(
                    f"reading `{path}` needs zstandard", hint='install it with: pip install "openglm[train]"', path=path
                ) from error
            try:
                # The corpus is compressed with a long window (zstd --long).
                with zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(file) as reader:
                    yield io.BufferedReader(reader)  # pyright: ignore[reportArgumentType]
            except zstandard.ZstdError as error:
                raise DataError(f"`{path}` is not valid zstd, or incomplete: {error}", path=path) from error
    except OSError as error:
        raise DataError(f"cannot read `{path}`: {error.strerror}", path=path) from error


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Documents of all files in order. Text files are one document; a JSON line has ``text``, or ``prompt`` and ``answer``.

    Raises ``DataError`` naming the file and line for what is no UTF-8, no JSON or has no text.
    """
    for path in find_files(paths):
        with _open(path) as file:
            if ".jsonl" not in path.suffixes:
                yield Document(_decode(file.read(), path, None), id=path.name, source=path.stem)
                continue
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(_decode(line, path, number))
                except ValueError as error:
                    raise DataError(f"`{path}` line {number} is not valid JSON", path=path) from error
                text, answer = (
                    (row.get("text", row.get("prompt")), row.get("answer")) if isinstance(row, dict) else (None, None)
                )
                if not isinstance(text, str) or not isinstance(answer, str | None):
                    raise DataError(f"`{path}` line {number} has no `text` (or `prompt` and `answer`)", path=path)
                yield Document(text, answer, str(row.get("id", number)), str(row.get("source", path.stem)))


def thin_out(paths: Iterable[str | Path], shares: Mapping[str, float]) -> Iterator[Document]:
    """``read_documents``, but of sources whose name fits a pattern of ``shares`` only that share, drawn with a fixed seed."""
    draws = random.Random(0)
    for path in find_files(paths):
        name = path.name.split(".")[0]
        share = next((share for pattern, share in shares.items() if fnmatch.fnmatch(name, pattern)), 1.0)
        yield from (document for document in read_documents([path]) if draws.random() < share)


def _decode(data: bytes, path: Path, line: int | None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" line {line}" if line else ""
        raise DataError(f"`{path}`{place} is not valid UTF-8 (byte {error.start})", path=path) from error
