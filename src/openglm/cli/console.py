"""What reaches the terminal: data to stdout, everything else to stderr, colour only where somebody can see it."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from openglm.errors import OpenGLMError, StorageError
from openglm.parallel.layout import started
from openglm.storage import storage_error

#: Style of what the model wrote.
ANSWER = "bold green"
_DUMB = ("dumb", "unknown")


class _Voice:
    """Whether this process speaks. Of those that torchrun started together to answer one text, one does."""

    silent = False
    tells_errors = True


def one_voice() -> None:
    """From now on only the first of the processes that torchrun started writes, and the first of each machine tells errors."""
    if started() > 1 and os.environ["RANK"] != "0":
        _Voice.silent = True
        _Voice.tells_errors = os.environ.get("LOCAL_RANK", "0") == "0"


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # closed, or replaced by something that is no file
        return False


def has_color(stream: TextIO) -> bool:
    """Whether colour may be used: a terminal, and neither ``NO_COLOR`` nor a terminal without colour."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "").lower() not in _DUMB


def paint(text: str, style: str, stream: TextIO) -> str:
    """``text`` with the ANSI codes of "bold green", "bold red", "cyan" or "dim", as far as ``stream`` shows colour."""
    codes = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}
    if not text or not has_color(stream):
        return text
    return f"\x1b[{';'.join(codes[word] for word in style.split())}m{text}\x1b[0m"


def printable(text: str, stream: TextIO) -> str:
    """On a terminal, control characters (a model may write any byte) become U+FFFD; a file gets them as they are."""
    if not is_terminal(stream):
        return text
    return "".join(c if c in "\n\t" or (c.isprintable() or not _is_control(c)) else "\ufffd" for c in text)


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def write(text: str, end: str = "\n") -> None:
    """Data: to stdout, at once."""
    if _Voice.silent:
        return
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_error(error) from error


def write_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    write(json.dumps(value, ensure_ascii=False))


def write_answer(text: str, answers: Sequence[tuple[int, int]]) -> None:
    """A text to stdout, the pieces ``[start, end)`` that the model wrote coloured on a terminal."""
    pieces, end = [], 0
    for start, stop in answers:
        pieces += [printable(text[end:start], sys.stdout), paint(printable(text[start:stop], sys.stdout), ANSWER, sys.stdout)]
        end = stop
    write("".join(pieces) + printable(text[end:], sys.stdout))


def note(text: str) -> None:
    """A remark: to stderr."""
    if not _Voice.silent:
        print(text, file=sys.stderr, flush=True)


def show_error(error: OpenGLMError) -> None:
    """``error: ...`` and, after a blank line, ``hint: ...``: to stderr."""
    lines = paint("error", "bold red", sys.stderr) + ": " + _one_line(error.message)
    if error.hint:
        lines += "\n\n" + paint("hint", "cyan", sys.stderr) + ": " + _one_line(error.hint)
    if _Voice.tells_errors:
        print(printable(lines, sys.stderr) if not has_color(sys.stderr) else lines, file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    # A message may quote what a user typed, which may hold anything.
    text = " ".join(text.splitlines()).encode("utf-8", "replace").decode()
    return "".join("\ufffd" if _is_control(c) else c for c in text)


def output_error(error: OSError) -> StorageError:
    """One sentence for an output that could not be written."""
    found = storage_error("standard output", error)
    message = found.message.replace("`standard output`", "to standard output")
    hint = "free some space or send the output elsewhere" if error.errno == errno.ENOSPC else found.hint
    return StorageError(message, hint=hint)


def open_closed() -> None:
    """A stream that was closed (``<&-``, ``>&-``) becomes an empty one; what is written to it is lost, as was wished."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open as long as the program)


def use_utf8() -> None:
    """Data is UTF-8 whatever the locale says; a terminal that cannot show a character gets a substitute."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        if reconfigure is None:
            continue
        if is_terminal(stream):
            reconfigure(errors="replace")
        elif encoding != "utf8":
            reconfigure(encoding="utf-8", errors="replace")


class Progress:
    """A bar on stderr for a job of known length; appears after two seconds, and only where a person looks."""

    def __init__(self, total: int | None, label: str, *, shown: bool = True, delay: float = 2.0) -> None:
        self.total = total
        self.label = label
        self.done = 0
        self._bar: Any = None
        if shown and is_terminal(sys.stderr) and not _Voice.silent:
            self._bar = _make_bar()
            self._task = self._bar.add_task(label, total=total)
            # A timer, not a look at the clock in `advance`: the first piece may take long.
            self._timer = threading.Timer(delay, self._show)
            self._timer.daemon = True
            self._lock = threading.Lock()
            self._timer.start()

    def advance(self, count: int = 1) -> None:
        """``count`` more pieces are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, description=self.label)

    def _show(self) -> None:
        with self._lock:
            if not self._timer.finished.is_set():
                self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with self._lock:
                self._timer.cancel()
                self._bar.stop()


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    # Lines written while the bar shows go above it where both are one terminal; a pipe must get them itself.
    return Progress(
        TextColumn("{task.description}"),
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=is_terminal(sys.stdout),
    )


@contextmanager
def progress(total: int | None, label: str, *, shown: bool = True) -> Iterator[Progress]:
    """A ``Progress`` that goes away when the block ends, however it ends; ``shown`` False: none at all."""
    bar = Progress(total, label, shown=shown)
    try:
        yield bar
    finally:
        bar.close()
