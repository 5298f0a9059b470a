"""The session, and the commands beside fill and generate."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import time
from pathlib import Path

import pytest
from command_line import GLM, TEXT, refuse, rows, run

from openglm.config import ModelConfig, QuantizationScheme
from openglm.tokenizers.unigram import UnigramTokenizer

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_bundled_model_answers_in_int8_unless_another_type_is_asked_for(tiny: Path, monkeypatch) -> None:
    from openglm.cli.answering import Request
    from openglm.kernels.cpu import library

    def scheme(model: str, **loading) -> QuantizationScheme | None:
        return Request("fill", model, loading={"device": "cpu", **loading}).glm.config.quantization

    fast = library.variant() not in (None, "portable")
    assert scheme("nano") == (QuantizationScheme(8, head_bits=8) if fast else None)
    assert scheme("nano", dtype="float32") is None and scheme(str(tiny)) is None
    assert scheme("nano", bits=4) == QuantizationScheme(4)
    assert scheme("nano", cache_dtype="bfloat16") is None
    for variant in ("none", "portable") if fast else ("none",):
        monkeypatch.setenv(library.VARIANT, variant)
        assert scheme("nano") is None


def test_a_job_knows_the_type_that_it_was_begun_in(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENGLM_CPU_KERNELS", "none")
    (tmp_path / "texts.txt").write_text("The [MASK].\n")
    job = ["fill", "--input", tmp_path / "texts.txt", "--output", tmp_path / "a.jsonl", "--device", "cpu", "--max-tokens", "2"]
    run(*job)
    assert "answered already" in run(*job, "--dtype", "float32").stderr  # as it was without compiled kernels
    assert "--dtype float32" in refuse(*job, "--draft", "lookup", "--seed", "1")
    message = refuse(*job[:4], tmp_path / "b.jsonl", "--group", "32")
    assert "`--group` needs `--bits`" in message and not (tmp_path / "b.jsonl").exists()


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


def test_a_dry_run_plans_and_a_smoke_run_trains(request) -> None:
    recipes = request.config.rootpath / "recipes"
    said = run("train", recipes / "130b.toml", "--dry-run").stdout
    assert "128,697,794,560 parameters, built on the meta device; data 24 x tensor 4 x pipeline 8: 768 processes" in said
    assert "    7   62 to 69 " in said and "fits 40" in said
    (plan,) = rows(run("train", recipes / "1.3b.toml", "--dry-run", "--gpu", "h200", "--json").stdout)
    assert plan["parameters"] == plan["stages"][0]["parameters"] == 1_317_984_256
    assert "needs 768 processes, but 96 were started" in refuse("train", recipes / "130b.toml", "--dry-run", "--gpus", "12x8")
    assert "cannot be divided over tensor 5" in refuse("train", recipes / "2b.toml", "--dry-run", "--set", "parallel.tensor=5")
    assert "did you mean `pipeline`" in refuse("train", recipes / "2b.toml", "--dry-run", "--set", "parallel.pipelin=2")
    run("train", recipes / "10b.toml", "--smoke", "--out", "smoked")
    assert Path("smoked/model/config.json").is_file() and not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# quantize


def test_quantize(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    target = tmp_path / "small"
    drawn = tmp_path / "errors.png"
    said = run("quantize", tiny, target, "--bits", "4", "--group", "32", "--text", text, "--plot", drawn).stderr
    assert "bytes before" in said and "relative error of the weights" in said and "bits per byte" in said
    assert "blanks filled exactly: " in said and drawn.read_bytes().startswith(b"\x89PNG")
    assert "4 bits, groups of 32" in run("info", target).stdout
    found = json.loads(run("info", target, "--json").stdout)
    assert found["config"]["quantization"] == {"bits": 4, "group": 32, "zero_point": False, "clip": False}
    assert run("fill", "-m", target, "The sky is [MASK].", "--max-tokens", "3").stdout
    run("convert", tiny, tmp_path / "same", "--dtype", "keep", "--bits", "4", "--group", "32")
    assert (tmp_path / "same/model-00001-of-00001.safetensors").read_bytes() == (
        target / "model-00001-of-00001.safetensors"
    ).read_bytes()
    assert "`--group` needs `--bits`" in refuse("convert", tiny, tmp_path / "no", "--group", "32")
    values = json.loads(run("quantize", tiny, tmp_path / "eight", "--bits", "8", "--clip", "--json").stdout)
    assert values["bytes"]["after"] < values["bytes"]["before"] and max(values["relative_errors"].values()) < 0.02


def test_quantize_refuses(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    assert "8 or 4 bits, not 5" in refuse("quantize", tiny, target, "--bits", "5")
    assert "groups of 32, 64, 128 columns, not of 48" in refuse("quantize", tiny, target, "--bits", "4", "--group", "48")
    assert "cannot be divided into groups of 128" in refuse("quantize", tiny, target, "--bits", "4", "--group", "128")
    assert not target.exists()
    run("quantize", tiny, target, "--bits", "8")
    assert "is not empty" in refuse("quantize", tiny, target, "--bits", "4")
    assert "quantized already" in refuse("quantize", target, tmp_path / "again", "--bits", "4")
    assert not (tmp_path / "again").exists()
