"""How the tests run the command line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openglm.cli import console
from openglm.cli.main import app

TEXT = """The sky is blue. The capital of France is Paris. Once upon a time there was a king who had three sons.
天空是蓝色的。北京是中国的首都。从前有一座山，山里有一座庙。
"""
GLM = Path(sys.executable).parent / "glm"


def run(*args: str | Path, input: str | bytes | None = None, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=input, prog_name="glm")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refuse(*args: str | Path, input: str | bytes | None = None) -> str:
    """Run a command that must fail as a user's mistake does; returns what stderr says."""
    result = run(*args, input=input, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message, _, hint = result.stderr.rstrip("\n").partition("\n\n")
    assert message.startswith("error: ") and "\n" not in message and not message.endswith(".")
    assert hint == "" or (hint.startswith("hint: ") and "\n" not in hint)
    return result.stderr


def processes(ranks: int, *arguments: str | Path, stdin: str = "", folders: list[Path]) -> list[tuple[int, str, str]]:
    """`glm` as torchrun starts it: exit code, stdout and stderr of each process; only the first is given ``stdin``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    started = []
    for rank, folder in zip(range(ranks), itertools.cycle(folders)):
        environment = os.environ | {key: str(value) for key, value in {**meeting, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, "-m", "openglm", *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, cwd=folder, text=True, stdin=pipe, stdout=pipe, stderr=pipe))
    said = [process.communicate("" if rank else stdin, timeout=100) for rank, process in enumerate(started)]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Makes the named standard streams look like a terminal, whatever the runner puts in their place."""
    with monkeypatch.context() as patch:
        patch.setattr(console, "is_terminal", lambda stream: any(stream is getattr(sys, name) for name in names))
        yield


def write_inputs(count: int) -> Path:
    path = Path("texts.jsonl")
    lines = [json.dumps({"id": f"n{i}", "text": f"{i} sky [MASK] 山[MASK]。"}, ensure_ascii=False) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
