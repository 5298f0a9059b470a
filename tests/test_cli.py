"""The command line, mostly in process; real processes where the process itself is the point."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import GLM, refuse, rows, run, terminal, write_inputs

from openglm.cli import console, convert, fill, generate, info, models, tokenizer

pytestmark = pytest.mark.usefixtures("surroundings")


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
    # A shell starts what it runs in the background with interrupts ignored; here they are meant.
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    child = subprocess.Popen([GLM, *job], stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
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
