"""Bad input on the command line: one sentence with the way out, exit code 2, no traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from command_line import GLM, refuse, rows, run, write_inputs

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.mark.parametrize("args", [["fill", ""], ["fill", "  \n"], ["generate", ""]])
def test_empty_text(args: list[str]) -> None:
    assert "empty" in refuse(*args)


def test_nothing_through_the_pipe() -> None:
    assert "holds no text" in refuse("fill", input="\n \n")
    assert "missing" in refuse("tokenizer", "encode", input="")


def test_wrong_options() -> None:
    for option, value in (("num-beams", "0"), ("temperature", "-1"), ("top-p", "1.5"), ("max-tokens", "0"), ("top-k", "-1")):
        assert f"`--{option}` must be" in refuse("fill", "a [MASK]", f"--{option}", value)
    assert "'--num-beams'" in refuse("fill", "a [MASK]", "--num-beams", "many")
    assert "no device `abacus`" in refuse("fill", "a [MASK]", "--device", "abacus")
    assert "`int3`" in refuse("fill", "a [MASK]", "--dtype", "int3")
    Path("in.txt").write_text("a [MASK]\n")
    assert "`--batch-size`" in refuse("fill", "--input", "in.txt", "--batch-size", "0")
    assert "exclude" in refuse("fill", "a [MASK]", "--input", "in.txt")
    assert "`--output`" in refuse("fill", "a [MASK]", "--output", "out.jsonl")


def test_text_over_the_context_and_an_unlearned_mask() -> None:
    assert "context of 64" in refuse("generate", "long " * 40)
    message = refuse("fill", "The sky. [sMASK]")
    assert "has not learned [sMASK]" in message and "[MASK]" in message.partition("hint")[2]


def test_unknown_models() -> None:
    assert "did you mean `nano`?" in refuse("fill", "a [MASK]", "--model", "nanno")
    assert "--download" in refuse("fill", "a [MASK]", "--model", "somebody/model")
    assert "did you mean `nano`?" in refuse("info", "nono")


def test_half_downloaded_and_foreign_folders(tiny: Path) -> None:
    folder = Path("half")
    folder.mkdir()
    assert "is empty" in refuse("fill", "a [MASK]", "-m", folder)
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:1000])
    for command in (["fill", "a [MASK]", "-m"], ["info"], ["info", "--verify"]):
        assert shard.name in refuse(*command, folder)
    shard.unlink()
    assert shard.name in refuse("generate", "a", "-m", folder)


def test_unreadable_and_invalid_files() -> None:
    assert "no-such-file" in refuse("fill", "--input", "no-such-file")
    assert "cannot read `.`" in refuse("fill", "--input", ".")
    Path("gb.txt").write_bytes("天空[MASK]\n".encode("gb18030"))
    assert "line 1 is not valid UTF-8" in refuse("fill", "--input", "gb.txt")
    assert "line 2 is not valid UTF-8" in refuse("fill", input=b"a [MASK]\n\xff [MASK]\n")
    assert "not valid UTF-8" in refuse("fill", os.fsdecode(b"\xff [MASK]"))
    assert "not valid UTF-8" in refuse("tokenizer", "encode", input=b"\xff")
    for line in ("{", "[1]", '{"prompt": "a"}', '{"text": ""}', '{"text": "\\ud800"}'):
        Path("in.jsonl").write_text('{"text": "a [MASK]"}\n' + line + "\n")
        assert "`in.jsonl` line 2" in refuse("fill", "--input", "in.jsonl")


def test_names_that_cannot_be_looked_at(tiny: Path) -> None:
    long = "a" * 300
    for name in (long, "~nobody-has-this-name/x", ""):
        for command in (["fill", "a [MASK]", "-m"], ["info"], ["convert", "--dtype", "keep"]):
            refuse(*command, name, *(["copy"] if command[0] == "convert" else []))
    write_inputs(1)
    for command in (
        ["fill", "--input", "texts.jsonl", "--output"],
        ["convert", tiny],
        ["tokenizer", "train", "texts.jsonl", "--out"],
    ):
        assert "the name is too long" in refuse(*command, long)


def test_closed_streams(tiny: Path) -> None:
    glm, model = shlex.quote(str(GLM)), shlex.quote(str(tiny))
    done = subprocess.run(["bash", "-c", f"{glm} fill -m {model} <&-"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "standard input holds no text" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(["bash", "-c", f"{glm} info {model} >&-"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(2)
    job = ("fill", "--input", "texts.jsonl", "--max-tokens", "2", "--output")
    assert "`/dev/full`: the disk is full" in refuse(*job, "/dev/full")
    for command in (["info", str(tiny)], ["--help"], ["fill", "a [MASK]", "-m", str(tiny), "--show-layout"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([GLM, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("the disk is full") == 1 and "Traceback" not in done.stderr

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "`out.jsonl`: the disk is full" in refuse(*job, "out.jsonl")
        assert "the disk is full" in refuse("convert", tiny, "copy")
        assert not Path("copy").exists()
    run(*job, "out.jsonl")
    assert len(rows(Path("out.jsonl").read_text(encoding="utf-8"))) == 2


def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    script = f"{shlex.quote(str(GLM))} info {shlex.quote(str(tiny))} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout in ("0\n", "141\n")


def test_hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    fetched: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        fetched.append(name)
        return str(tiny)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    out = run("fill", "a [MASK]", "--model", "somebody/model", "--download", "--max-tokens", "2")
    assert out.stdout.startswith("a ") and fetched == ["somebody/model"]

    def unreachable(name: str, **_: object) -> str:
        raise ConnectionError("name resolution failed.\nmore")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    result = run("info", "somebody/model", "--download", code=2)
    assert "error: the hub cannot be reached for `somebody/model`: name resolution failed\n\nhint" in result.stderr
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [GLM, "info", "somebody/model", "--download"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "somebody/model" in done.stderr
