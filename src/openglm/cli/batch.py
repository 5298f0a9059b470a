"""Many texts from a file or a pipe, and an output file that goes on where an interruption left it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from openglm.cli import console
from openglm.errors import InputError, StorageError
from openglm.storage import Journal, storage_error

_UTF8_HINT = "convert it to UTF-8, for one with: iconv -f GB18030 -t UTF-8"


@dataclass(frozen=True)
class Line:
    """One text of the input."""

    number: int
    """Line in the input, from 1."""
    text: str
    id: Any = None
    """The "id" of a JSON line; None without one."""

    @property
    def digest(self) -> str:
        """Tells whether a text is still the one that was answered."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def read_lines(source: str) -> list[Line]:
    """The texts of a file, or of stdin for "-": plain lines, or JSON lines with "text" and perhaps "id".

    A file called .jsonl holds JSON lines; elsewhere the first line tells. Blank lines are skipped. Raises
    ``InputError`` naming the file and line for what is not UTF-8 or has no text.
    """
    name = "standard input" if source == "-" else f"`{source}`"
    lines: list[Line] = []
    as_json: bool | None = True if source.endswith((".jsonl", ".ndjson")) else None
    for number, raw in enumerate(_read(source).split(b"\n"), 1):
        place = f"{name} line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not valid UTF-8 (byte {error.start + 1})", hint=_UTF8_HINT) from error
        if not text.strip():
            continue
        if as_json is None:
            as_json = _is_json_line(text)
        lines.append(_json_line(text, number, place) if as_json else Line(number, text))
    if not lines:
        raise InputError(f"{name} holds no text", hint="give one text a line")
    return lines


def _read(source: str) -> bytes:
    if source == "-":
        return typer.get_binary_stream("stdin").read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise _unreadable(source, error) from error


def read_text(what: str) -> str:
    """All of stdin. Raises ``InputError`` if nothing comes (``what`` is missing), or no UTF-8."""
    data = b"" if console.is_terminal(sys.stdin) else _read("-")
    if not data.strip():
        raise InputError(f"{what} is missing", hint="give it as an argument, or through a pipe")
    try:
        return data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid UTF-8 (byte {error.start + 1})", hint=_UTF8_HINT) from error


def _unreadable(source: str, error: OSError) -> InputError:
    return InputError(f"cannot read `{source}`: {(error.strerror or str(error)).lower()}", path=source)


def _is_json_line(text: str) -> bool:
    try:
        row = json.loads(text)
    except ValueError:
        return False
    return isinstance(row, dict) and "text" in row


def _json_line(text: str, number: int, place: str) -> Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON", hint='a line looks like {"text": "..."}') from error
    found = row.get("text") if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise InputError(f'{place} has no "text"', hint='a line looks like {"text": "..."}')
    if not found.strip():
        raise InputError(f"{place} has an empty text", hint="remove the line or give it a text")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} holds half of a surrogate pair, which is no text", hint="repair the line") from error
    return Line(number, found, row.get("id"))


class Results:
    """The output file: a journal of answers, each with the line and a digest of the text that it answers."""

    def __init__(self, path: Path, lines: Sequence[Line], source: str, job: dict[str, Any], advice: str = "") -> None:
        self.path, self._advice = path, advice
        self.job = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()[:8]
        _refuse_other_files(path)
        self._journal = Journal(path)
        try:
            self.done = self._check({line.number: line for line in lines}, source)
        except BaseException:
            self._journal.close()
            raise

    def _check(self, lines: dict[int, Line], source: str) -> set[int]:
        done: set[int] = set()
        fresh = "restore the input, or choose another --output"
        for entry in self._journal.entries:
            number = entry.get("line")
            if not isinstance(number, int) or "sha256" not in entry:
                raise _foreign(self.path)
            if number not in lines or lines[number].digest != entry["sha256"]:
                raise InputError(f"line {number} of {source} has changed since `{self.path}` answered it", hint=fresh)
            if entry.get("job") != self.job:
                hint = "give the options of the first run, or choose another --output"
                hint += f"; {self._advice}" if self._advice else ""
                message = f"`{self.path}` was begun with another model or other options"
                raise InputError(message, hint=hint, path=self.path)
            done.add(number)
        return done

    def add(self, line: Line, result: dict[str, Any]) -> None:
        """Write one answer; it is on disk when this returns."""
        self._journal.append({"line": line.number, "sha256": line.digest, "job": self.job, **with_id(line, result)})

    def close(self) -> None:
        """Close the file."""
        self._journal.close()


class Stream:
    """An output that cannot be read back: a pipe or a device. Every answer is written, none is remembered."""

    done: frozenset[int] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise storage_error(path, error) from error

    def add(self, line: Line, result: dict[str, Any]) -> None:
        """Write one answer."""
        try:
            self._file.write(json.dumps({"line": line.number, **with_id(line, result)}, ensure_ascii=False) + "\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # `add` has told of it
            self._file.close()


class Elsewhere:
    """An output that another process writes; this one only knows what is answered already."""

    def __init__(self, path: Path, done: set[int]) -> None:
        self.path, self.done = path, done

    def add(self, line: Line, result: dict[str, Any]) -> None:
        """The other process has it, too."""

    def close(self) -> None:
        """Nothing is open."""


def with_id(line: Line, result: dict[str, Any]) -> dict[str, Any]:
    """The result, led by the "id" of its line where it has one."""
    return result if line.id is None else {"id": line.id, **result}


def open_results(path: Path, lines: Sequence[Line], source: str, job: dict[str, Any], advice: str = "") -> Results | Stream:
    """The output file of a job, new or begun; ``advice`` on how another run's job may differ.

    Raises ``InputError`` if it belongs to another job, ``StorageError``.
    """
    if path.is_dir():
        raise StorageError(f"cannot write `{path}`: it is a folder", hint="give the name of a file", path=path)
    if path.exists() and not path.is_file():
        return Stream(path)
    return Results(path, lines, source, job, advice)


def _refuse_other_files(path: Path) -> None:
    # Before the journal is opened, because it cuts off a torn last line: a file of somebody else stays as it is.
    begin = b'{"line": '
    try:
        with open(path, "rb") as file:
            head = file.read(len(begin))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(str(path), error) from error
    if not begin.startswith(head):
        raise _foreign(path)


def _foreign(path: Path) -> InputError:
    return InputError(
        f"`{path}` exists and is not the output of such a job", hint="choose another --output, or remove the file", path=path
    )


def run_batch(
    lines: Sequence[Line],
    answer: Callable[[], Callable[[list[str]], Sequence[Any]]],
    *,
    results: Results | Stream | Elsewhere | None,
    batch_size: int,
    show: Callable[[Line, Any], None],
    source: str,
    label: str,
) -> None:
    """Answer all lines in order, ``batch_size`` at once, into ``results``, or with ``show`` one by one.

    ``answer()`` loads the model, only if there is something to do, and returns the function that answers a batch. An
    ``InputError`` names the line of ``source``; what stands before that line is answered.
    """
    left = [line for line in lines if results is None or line.number not in results.done]
    before = len(lines) - len(left)
    if before:
        console.note(f"{before:,} of {len(lines):,} texts are answered already")
    written = before
    with _stopped(lambda: _way_on(written, len(lines), results)):
        if left:
            answer_batch = answer()
            hidden = results is None and console.is_terminal(sys.stdout)  # the answers themselves show the progress
            with console.progress(len(left), label, shown=not hidden) as bar:
                for line, result in _answers(left, answer_batch, batch_size, source):
                    if results is None:
                        show(line, result)
                    else:
                        results.add(line, result.to_dict())
                    written += 1
                    bar.advance()
    if results is not None:
        console.note(f"{len(lines):,} texts answered: `{results.path}`")


def _answers(
    lines: Sequence[Line], answer_batch: Callable[[list[str]], Sequence[Any]], size: int, source: str
) -> Iterator[tuple[Line, Any]]:
    for start in range(0, len(lines), size):
        batch = lines[start : start + size]
        try:
            yield from zip(batch, answer_batch([line.text for line in batch]), strict=True)
        except InputError as error:
            if error.key:  # an option
                raise
            if len(batch) == 1:
                error.message = f"{source} line {batch[0].number}: {error.message}"
                raise
            yield from _answers(batch, answer_batch, 1, source)  # which line is it?


@contextlib.contextmanager
def _stopped(way_on: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        console.note(way_on())
        raise typer.Exit(130) from interrupt


def _way_on(written: int, total: int, results: Results | Stream | Elsewhere | None) -> str:
    if isinstance(results, Results):
        return f"interrupted with {written:,} of {total:,} texts answered; the same command goes on from there"
    return f"interrupted with {written:,} of {total:,} texts answered; with --output FILE.jsonl a job can go on later"
