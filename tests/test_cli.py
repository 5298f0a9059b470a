"""The command line, mostly in process; real processes where the process itself is the point."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openglm import bundled
from openglm.checkpoints import save_checkpoint
from openglm.cli import console, convert, fill, generate, info, models, tokenizer
from openglm.cli.main import app
from openglm.config import ModelConfig
from openglm.models.glm130b import GLM130B
from openglm.tokenizers.unigram import UnigramTokenizer, train_unigram

TEXT = """The sky is blue. The capital of France is Paris. Once upon a time there was a king who had three sons.
天空是蓝色的。北京是中国的首都。从前有一座山，山里有一座庙。
"""
GLM = Path(sys.executable).parent / "glm"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> UnigramTokenizer:
    return train_unigram([TEXT * 20], tmp_path_factory.mktemp("tokenizer") / "unigram.model", vocab_size=320)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: UnigramTokenizer) -> Path:
    """A model folder with random weights; it knows [MASK] and [gMASK], and its context is 64."""
    special = {name: token for name, token in tiny_tokenizer.special_tokens.items() if name != "unk"}
    masks = ("[MASK]", "[gMASK]")
    config = ModelConfig(2, 64, 1, 128, tiny_tokenizer.vocab_size, 64, special_tokens=special, learned_masks=masks)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    network = GLM130B(config).initialize(7)
    save_checkpoint(folder, config, dict(network.named_parameters()), tokenizer=tiny_tokenizer, dtype="float16")
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, and the tiny model bundled under the name `nano`."""
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "nano").symlink_to(tiny)
    monkeypatch.setattr(bundled, "ASSETS", assets)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield


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


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Makes the named standard streams look like a terminal, whatever the runner puts in their place."""
    with monkeypatch.context() as patch:
        patch.setattr(console, "is_terminal", lambda stream: any(stream is getattr(sys, name) for name in names))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Help, start-up, completion


def test_help_and_info_import_no_torch(tiny: Path) -> None:
    commands = ["", "fill", "generate", "info", "convert", "train", "tokenizer", *(f"tokenizer {c}" for c in TOKENIZER)]
    code = f"""
import sys
from typer.testing import CliRunner
from openglm.cli.main import app
calls = [[*command.split(), "--help"] for command in {commands!r}] + [["info", {str(tiny)!r}], ["--version"]]
for call in calls:
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "torch" not in sys.modules, call
    print(result.output)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example") >= len(commands) - 1


TOKENIZER = ("train", "encode", "decode")


def test_glm_alone_shows_help() -> None:
    assert "Commands" in run().stdout
    assert "unknown" in refuse("unknown")
    assert "`glm fill --help`" in refuse("fill", "--colour")
    assert "quotes" in refuse("fill", "The", "sky", "is", "[MASK]")


@pytest.mark.parametrize(
    "examples", [fill.EXAMPLES, generate.EXAMPLES, info.EXAMPLES, convert.EXAMPLES, tokenizer.ENCODE, tokenizer.DECODE]
)
def test_examples_work_as_typed(examples: str) -> None:
    lines = [line.strip().replace(r"\[", "[") for line in examples.splitlines() if line.startswith("  ")]
    assert lines
    for line in lines:
        if line.startswith("printf"):
            subprocess.run(["bash", "-c", line], check=True)
        elif "glm-130b-sat" not in line:  # 260 GB
            output = None
            for part in line.split(" | "):
                words = shlex.split(part)
                assert words.pop(0) == "glm"
                output = run(*words, input=output).stdout


def test_completion_in_bash(tmp_path: Path) -> None:
    script = f"""
export PATH={shlex.quote(str(GLM.parent))}:$PATH
eval "$(glm --show-completion bash 2>/dev/null || glm --show-completion)"
complete -p glm
COMP_WORDS=(glm fill --model na); COMP_CWORD=3; _glm_completion glm; echo "${{COMPREPLY[@]}}"
COMP_WORDS=(glm gen); COMP_CWORD=1; _glm_completion glm; echo "${{COMPREPLY[@]}}"
"""
    (tmp_path / "work" / "nagoya").mkdir()
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "SHELL": "/bin/bash"}, check=False
    )
    lines = done.stdout.splitlines()
    assert "_glm_completion" in lines[0], done.stderr
    assert "nagoya" in lines[1].split() and lines[2] == "generate"


def test_completion_of_models(tiny: Path) -> None:
    assert models.complete_model("na") == ["nano"]
    assert models.complete_model(f"{tiny.parent}/ti") == [str(tiny)]
    assert models.complete_model("/nowhere/at/all") == []


# ---------------------------------------------------------------------------------------------------------------------
# fill and generate


def test_fill_prints_the_text_and_nothing_else(tiny: Path) -> None:
    result = run("fill", "The sky is [MASK].", "--model", tiny, "--max-tokens", "4")
    assert re.fullmatch(r"The sky is .*\.\n", result.stdout, re.DOTALL) and result.stderr == ""
    same = run("fill", "The sky is [MASK].", "-m", tiny, "--max-tokens", "4", "--json")
    (row,) = rows(same.stdout)
    assert row["text"] + "\n" == result.stdout
    (span,) = row["spans"]
    assert row["text"][span["start"] : span["end"]] == span["text"] and span["kind"] == "[MASK]"


def test_fill_of_several_blanks_and_settings() -> None:
    sampled = (
        "fill",
        "天空是[MASK]，山是[MASK]。",
        "--temperature",
        "0.9",
        "--top-k",
        "20",
        "--top-p",
        "0.9",
        "--max-tokens",
        "6",
    )
    first, second = (rows(run(*sampled, "--seed", seed, "--json").stdout) for seed in ("1", "1"))
    assert first == second and len(first[0]["spans"]) == 2
    other = rows(run(*sampled, "--seed", "2", "--json").stdout)
    assert other != first
    beams = ("--num-beams", "3", "--length-penalty", "0.7", "--no-repeat-ngram-size", "2", "--min-tokens", "2")
    (row,) = rows(run("fill", "[MASK] sky", *beams, "--max-tokens", "5", "--json").stdout)
    assert len(row["spans"][0]["token_ids"]) >= 2
    (row,) = rows(run("fill", "[MASK] sky", "--repetition-penalty", "3", "--max-tokens", "3", "--stop", "zz", "--json").stdout)
    assert len(set(row["spans"][0]["token_ids"])) == 3


def test_fill_without_a_blank_says_that_it_continues() -> None:
    result = run("fill", "The sky", "--max-tokens", "2")
    assert result.stdout.startswith("The sky") and "no [MASK]" in result.stderr


def test_generate_streams_the_same_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("Once upon a time", "从前[gMASK]庙"):
        plain = run("generate", text, "--max-tokens", "12").stdout
        (row,) = rows(run("generate", text, "--max-tokens", "12", "--json").stdout)
        assert row["text"] + "\n" == plain and row["answer"] in plain
        with terminal(monkeypatch, "stdout"):
            shown = run("generate", text, "--max-tokens", "12").stdout
            beams = run("generate", text, "--max-tokens", "12", "--num-beams", "2").stdout
        assert "\x1b[1;32m" in shown and "\x1b[1;32m" in beams
        assert re.sub(r"\x1b\[[\d;]*m", "", shown) == console.printable(plain, sys.stdout)


def test_colour_only_where_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, "stdout"):
        (span,) = rows(run("fill", "The [MASK] sky", "--max-tokens", "3", "--json").stdout)[0]["spans"]
        assert f"The \x1b[1;32m{span['text']}\x1b[0m sky" in run("fill", "The [MASK] sky", "--max-tokens", "3").stdout
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in run("fill", "The [MASK] sky", "--max-tokens", "3").stdout


def test_terminals_get_no_control_characters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console.write_answer("a\x1b[2Jb", [(0, 4)])
    assert capsys.readouterr().out == "a\x1b[2Jb\n"  # a file gets what was written
    with terminal(monkeypatch, "stdout"):
        console.write_answer("a\x1b]0;x\x07\x9b2J\n天空\t👩‍🚀", [(0, 1)])
        out = capsys.readouterr().out
    assert out == "\x1b[1;32ma\x1b[0m\ufffd]0;x\ufffd\ufffd2J\n天空\t👩‍🚀\n"


def test_progress_appears_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich looks at the stream itself
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stderr)
    for delay, seen in ((60.0, False), (0.0, True)):
        bar = console.Progress(2, "filling", delay=delay)
        time.sleep(0.2)
        bar.advance()
        bar.close()
        assert ("filling" in capsys.readouterr().err) == seen
    with console.progress(2, "filling", shown=False) as bar:
        bar.advance(2)


def test_show_layout() -> None:
    out = run("fill", "The sky is [MASK]. [MASK]", "--show-layout").stdout
    assert re.search(r"^A +\d+ +\[MASK\] +3 ", out, re.MULTILINE) and re.search(r"^B +\d+ +sop +7 ", out, re.MULTILINE)
    (row,) = rows(run("fill", "天空是[gMASK]", "--show-layout", "--json").stdout)
    n = row["context"]
    assert row["tokens"][-2:] == ["[gMASK]", "sop"] and row["positions"] == [*range(n), n] and row["answer_start"] == n + 1
    assert row["visible"][0] == [1] * n + [0] and row["visible"][-1] == [1] * (n + 1)


def test_text_comes_through_a_pipe() -> None:
    piped = run("fill", "--max-tokens", "2", input="\ufeffThe [MASK] sky\r\n\n天[MASK]\n").stdout.splitlines()
    assert [line[:1] for line in piped] == ["T", "天"]
    given = run("fill", "--input", "-", "--json", "--max-tokens", "2", input='{"text": "a [MASK]\\nb", "id": 7}\n').stdout
    (row,) = rows(given)
    assert row["id"] == 7 and row["text"].endswith("\nb")


# ---------------------------------------------------------------------------------------------------------------------
# Files of texts


def write_inputs(count: int) -> Path:
    path = Path("texts.jsonl")
    lines = [json.dumps({"id": f"n{i}", "text": f"{i} sky [MASK] 山[MASK]。"}, ensure_ascii=False) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


JOB = ("fill", "--input", "texts.jsonl", "--output", "out.jsonl", "--max-tokens", "4", "--batch-size", "3")


def test_a_job_goes_on_where_it_stopped() -> None:
    write_inputs(8)
    run(*JOB)
    whole = Path("out.jsonl").read_bytes()
    found = rows(whole.decode())
    assert [(row["line"], row["id"]) for row in found] == [(i + 1, f"n{i}") for i in range(8)]
    assert [row["text"][:1] for row in found] == [str(i) for i in range(8)]
    cut = whole.splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(cut[:4]) + cut[4][:17])  # the power failed in the middle of line 5
    assert "4 of 8 texts are answered" in run(*JOB).stderr
    whole = Path("out.jsonl").read_bytes()
    assert whole.startswith(b"".join(cut[:4]))
    again = rows(whole.decode())  # log-probabilities may differ in the last bit: other texts are beside them
    assert [{**row, "spans": 0} for row in again] == [{**row, "spans": 0} for row in found]
    run(*JOB)  # nothing left to do
    assert Path("out.jsonl").read_bytes() == whole


def test_an_output_of_another_job_is_refused() -> None:
    path = write_inputs(3)
    run(*JOB)
    whole = Path("out.jsonl").read_bytes()
    assert "other options" in refuse(*JOB, "--seed", "3")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("1 sky", "1 sea"), encoding="utf-8")
    assert "line 2 of `texts.jsonl` has changed" in refuse(*JOB)
    path.write_text(text.splitlines()[0] + "\n", encoding="utf-8")
    assert "line 2 of `texts.jsonl` has changed" in refuse(*JOB)
    assert Path("out.jsonl").read_bytes() == whole
    for other in ("my thesis", '{"text": "a training file"}\n', "\0\0"):  # no newline at the end: still untouched
        Path("out.jsonl").write_text(other)
        assert "`out.jsonl` exists" in refuse(*JOB)
        assert Path("out.jsonl").read_text() == other


def test_a_bad_line_is_named_and_those_before_it_are_kept() -> None:
    Path("texts.txt").write_text("a [MASK]\nb [MASK]\n" + "long " * 40 + "[MASK]\nc [MASK]\n")
    message = refuse("fill", "--input", "texts.txt", "--output", "out.jsonl", "--max-tokens", "2")
    assert "`texts.txt` line 3: " in message and "context of 64" in message
    assert [row["line"] for row in rows(Path("out.jsonl").read_text())] == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child")
def test_an_interrupt_loses_nothing_and_repeats_nothing(tiny: Path) -> None:
    write_inputs(150)
    output = Path("out.jsonl")
    job = [*JOB[:-1], "1", "--model", str(tiny)]
    child = subprocess.Popen([GLM, *job], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_bytes().count(b"\n") > 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert re.fullmatch(r"interrupted with \d+ of 150 texts answered; the same command goes on from there\n", stderr)
    before = output.read_bytes()
    assert 4 < before.count(b"\n") < 150
    run(*job, "--batch-size", "50")
    after = output.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert [row["line"] for row in rows(after.decode())] == list(range(1, 151))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


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


# ---------------------------------------------------------------------------------------------------------------------
# Session


def test_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from openglm.cli.answering import Request
    from openglm.cli.session import history_file, make_prompt, run_session

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    request = Request("fill", "nano", settings={"max_tokens": 3})
    with create_pipe_input() as keys:
        # A text, one of two lines, a mistake, an empty line, help, Ctrl-C on a half-written text, the end.
        keys.send_text("The [MASK] sky\r" + "one\x1b\rtwo [MASK]\r" + "[sMASK]\r" + "\r" + "/help\r" + "half\x03" + "\x04")
        run_session(request, make_prompt(input=keys, output=DummyOutput()))
    found = capsys.readouterr()
    assert re.fullmatch(r"The .* sky\none\ntwo .*\n", found.out, re.DOTALL)
    assert "has not learned [sMASK]" in found.err and "Alt-Enter" in found.err
    assert "+one\n+two [MASK]\n" in history_file().read_text(encoding="utf-8")
    with create_pipe_input() as keys:
        keys.send_text("\x1b[A\x1b[A\x1b[A\r/exit\r")  # up: /help, [sMASK], the text of two lines
        run_session(request, make_prompt(input=keys, output=DummyOutput()))
    assert capsys.readouterr().out.startswith("one\ntwo")


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminal")
def test_session_on_a_real_terminal(tiny: Path, tmp_path: Path) -> None:
    import pty

    main, side = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [GLM, "generate", "--model", str(tiny), "--max-tokens", "3"]
    child = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True)
    os.close(side)
    seen = b""

    def expect(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if select.select([main], [], [], 1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(main, 4096)
        assert text in seen, seen.decode(errors="replace")

    try:
        expect(b"Ctrl-D to end")
        expect(b">")
        os.write(main, b"Once\r")
        expect(b"\x1b[1;32m")
        seen = seen[seen.rindex(b"\x1b[1;32m") :]
        expect(b">")
        os.write(main, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(main)


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def test_info(tiny: Path, tmp_path: Path) -> None:
    out = run("info", "nano").stdout
    assert re.search(r"^parameters +[\d,]+$", out, re.MULTILINE) and "[MASK] [gMASK]" in out and "320 ids" in out
    (row,) = rows(run("info", tiny, "--json").stdout)
    assert row["parameters"] == ModelConfig.from_json(tiny / "config.json").parameter_count
    assert row["bytes"] == sum(file.stat().st_size for file in tiny.iterdir())
    (verified,) = rows(run("info", tiny, "--verify", "--json").stdout)
    assert verified.pop("verified") and verified == row
    (listed,) = rows(run("info", "--json").stdout)[0]
    assert listed["name"] == "nano" and "nano" in run("info").stdout


def test_info_finds_damage(tiny: Path) -> None:
    folder = Path("copy")
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (shard,) = folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    run("info", folder)
    assert f"{shard.name}` is damaged" in refuse("info", folder, "--verify")


def test_convert(tiny: Path) -> None:
    result = run("convert", tiny, "full", "--dtype", "float32")
    assert result.stdout == "" and "`full`" in result.stderr
    text = run("fill", "The [MASK] sky", "-m", "full", "--max-tokens", "4").stdout
    assert text == run("fill", "The [MASK] sky", "-m", tiny, "--max-tokens", "4").stdout
    assert "not empty" in refuse("convert", tiny, "full")
    assert "`--dtype`" in refuse("convert", tiny, "other", "--dtype", "int1")
    assert "no model" in refuse("convert", "nowhere", "other")
    Path("other.json").write_text("{}")
    assert "other.json" in refuse("convert", tiny, "other", "--config", "other.json")


def test_released_checkpoints(shared: Path) -> None:
    folder = sorted(path.parent for path in (shared / "golden" / "checkpoint").rglob("latest"))[0]
    out = run("info", folder, "--verify").stdout
    assert "released GLM-130B layout" in out and "every tensor was read" in out and "tokenizer         none" in out
    run("convert", folder, "own", "--dtype", "keep")
    assert "openglm, version 1" in run("info", "own").stdout
    assert "no tokenizer" in refuse("fill", "a [MASK]", "-m", "own")
    assert "no tokenizer" in refuse("fill", "a [MASK]", "-m", "own", "--show-layout")


def test_tokenizer_commands(tiny: Path) -> None:
    Path("a.txt").write_text(TEXT * 5, encoding="utf-8")
    row = json.dumps({"text": TEXT * 5, "id": 1})
    Path("b.jsonl").write_text(f"{row}\n{row}\n")
    (made,) = rows(run("tokenizer", "train", "a.txt", "b.jsonl", "--out", "t.model", "--vocab-size", "320", "--json").stdout)
    assert made == {"file": "t.model", "vocab_size": 320, "documents": 3}
    for model in (["-m", "t.model"], ["-m", str(tiny)], []):
        text = " The  sky\n天空 👩‍🚀"
        ids = run("tokenizer", "encode", text, *model).stdout
        assert run("tokenizer", "decode", *ids.split(), *model).stdout == text + "\n"
        assert run("tokenizer", "decode", *model, input=ids).stdout == text + "\n"
    (row,) = rows(run("tokenizer", "encode", "[MASK]", "--json").stdout)
    assert 3 not in row["ids"] and "".join(row["pieces"]) == "[MASK]"  # text, not the mask token
    assert "`t.model` exists" in refuse("tokenizer", "train", "a.txt", "--out", "t.model", "--vocab-size", "320")
    assert "--vocab-size" in run("tokenizer", "train", "a.txt", "--out", "u.model", "--vocab-size", "9000", code=2).stderr
    assert not Path("u.model").exists()
    assert "`--vocab-size`" in refuse("tokenizer", "train", "a.txt", "--out", "u.model", "--vocab-size", "10")
    assert "no-file" in refuse("tokenizer", "train", "no-file", "--out", "u.model")
    assert "'x'" in refuse("tokenizer", "decode", "x")
    assert "99999" in refuse("tokenizer", "decode", "99999")
    assert "a.txt" in refuse("tokenizer", "encode", "a", "-m", "a.txt")


def test_train(tiny_tokenizer: UnigramTokenizer) -> None:
    corpus = Path("corpus")
    corpus.mkdir()
    for name, count in (("train.jsonl", 30), ("validation-en.jsonl", 2), ("validation-zh.jsonl", 2)):
        row = json.dumps({"text": TEXT, "id": 1, "lang": "en", "source": "x"})
        (corpus / name).write_text(f"{row}\n" * count)
    shape = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "inner_hidden_size": 64}
    shape |= {"vocab_size": 384, "max_sequence_length": 128}
    Path("small.toml").write_text(
        "[model.changes]\n"
        + "".join(f"{key} = {value}\n" for key, value in shape.items())
        + "[objectives]\nwindow = 64\nlong_window = 64\n"
        + "[run]\nsamples = 16\nbatch_size = 4\nlog_every = 1\nvalidation_windows = 1\n"
    )
    command = ["train", "small.toml", "--data", "corpus", "--tokenizer", str(tiny_tokenizer.path)]
    found = rows(run(*command, "--json", "--set", "run.seed=3").stdout)
    assert [row["step"] for row in found[:-1]] == [1, 2, 3, 4]
    assert run("fill", "The [MASK] sky", "-m", found[-1]["model"], "--max-tokens", "2").stdout.startswith("The ")
    assert "resumed" in run(*command, "--resume", "--set", "run.seed=3", "--set", "run.samples=20").stderr
    assert "did you mean `run.batch_size`" in refuse(*command, "--set", "run.batchsize=1").replace(
        "`batch_size`", "`run.batch_size`"
    )
    assert "no snapshot" in refuse(*command, "--out", "empty", "--resume")
    assert "exclude" in refuse(*command, "--fresh", "--resume")
    assert "missing.toml" in refuse("train", "missing.toml")
    assert "no device `moon`" in refuse(*command, "--out", "empty", "--set", "run.device=moon")
