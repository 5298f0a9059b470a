"""Watching a run: the report's files, the view on a terminal, and the mirrors of its metrics."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import refuse, rows, run, terminal
from rich.console import Console
from test_stability import RUN, poison

from openglm.cli.train import _progress
from openglm.cli.train_view import TrainView, sparkline
from openglm.data.shards import write_shards
from openglm.errors import ConfigError, InputError
from openglm.training.recipe import read_recipe
from openglm.training.report import write_report
from openglm.training.report.lines import Series, fold, smooth
from openglm.training.report.reading import distinct_names, read_interventions, read_run
from openglm.training.report.summary import summarize
from openglm.training.run import train
from openglm.training.snapshots import Progress
from openglm.training.step import StepResult
from openglm.training.trackers import Trackers, check_trackers


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_corpus, tiny_tokenizer_path):
    folder = tmp_path_factory.mktemp("prepared")
    write_shards([tiny_corpus], folder, tiny_tokenizer_path, workers=1)

    def make(*changes: str):
        data = (f'data.corpus="{folder}"', f'data.tokenizer="{tiny_tokenizer_path}"')
        return read_recipe(None, [*RUN, *data, *changes])

    return make


def has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory) -> Path:
    """A run with a skipped step, a roll-back, and a resume under another rate."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    policy = ["stability.spike_loss=2.0", "stability.patience=2", "stability.rewarm_samples=16", "run.validate_every=8"]
    if has("torch.utils.tensorboard"):
        policy.append("run.trackers=tensorboard")

    def spoil(model, losses) -> None:
        if len(seen) == 0:
            next(iter(model.weights().values())).grad[3, 5] = math.nan
        else:
            for loss in losses:
                loss += 50.0
        seen.append(True)

    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, lambda first: first == 40 or 92 <= first < 100, spoil)
        train(recipe(*policy), out, log=lambda _: None)
    train(recipe(*policy, "run.samples=176", "optimizer.learning_rate=0.002"), out, log=lambda _: None)
    return out


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def made_run(folder: Path, count: int, **changes) -> Path:
    """Metrics as a run writes them, from numbers; a change may be a function of the row's place."""
    folder.mkdir(parents=True)
    lines = []
    for k in range(count):
        row = {"step": k + 1, "samples": 8 * (k + 1), "tokens": 900 * (k + 1), "seconds": 2.0 * k, "loss": 5.0 - 0.01 * k}
        row |= {"gradient_norm": 1.0, "learning_rate": 1e-3, "loss_scale": 1.0, "tokens_per_second": 450.0}
        row |= {"losses": {"[MASK] en": 4.0}, "bits_per_byte": {}}
        row |= {key: value(k) if callable(value) else value for key, value in changes.items()}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


# --- reading


def test_the_last_of_repeated_steps_counts_and_a_torn_line_is_left_out(tmp_path) -> None:
    folder = made_run(tmp_path / "run", 6)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (4, 5):  # went back to a snapshot of step 3
            file.write(json.dumps({"step": step, "samples": 8 * step, "loss": 1.5}) + "\n")
        file.write('{"step": 6, "samp')
    read = read_run(folder)
    assert [row["step"] for row in read.rows] == [1, 2, 3, 4, 5]
    assert read.column("loss")[-2:].tolist() == [1.5, 1.5] and np.isnan(read.column("seconds")[-1])
    assert summarize(read)["samples"] == 40 and summarize(read)["seconds"] is None


def test_what_is_no_run_gets_one_sentence(tmp_path) -> None:
    def sentence(content: str | None) -> str:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / "metrics.jsonl").write_text(content)
        with pytest.raises(InputError) as caught:
            write_report([folder])
        assert sorted(path.name for path in folder.iterdir()) == ([] if content is None else ["metrics.jsonl"])
        return caught.value.message

    assert "holds no metrics.jsonl" in sentence(None)
    assert "has no rows yet" in sentence("")
    assert "has no rows yet" in sentence('{"step": 1, ')
    assert "line 1 is not a JSON object" in sentence('nonsense\n{"step": 1, "samples": 8}\n')
    assert "line 1 has no step and samples" in sentence('{"loss": 1}\n')
    with pytest.raises(InputError, match="does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_rollback_is_one_intervention_that_says_why_and_what_followed(watched) -> None:
    found = read_interventions(watched)
    assert [one.kind for one in found] == ["skip", "step", "rollback", "resume"]
    skip, _, back, resume = found
    assert (skip.samples, skip.text) == (40, "the gradient is not finite")
    assert re.match(r"loss \d+\.\d+, the median is .*; back to `samples-0000000080`; samples 80 to 100 left out; ", back.text)
    assert "rate re-warmed over 16 samples" in back.text and back.left_out == (80, 100)
    assert "optimizer.learning_rate: 0.003 -> 0.002" in resume.text


def test_runs_of_one_name_are_told_apart(tmp_path) -> None:
    assert distinct_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


# --- drawing


def test_a_wild_row_does_not_bend_the_smoothed_line() -> None:
    line = np.linspace(6.0, 2.0, 400)
    wild = line.copy()
    wild[200:203] += 50.0
    assert np.abs(smooth(wild) - line).max() < 0.15
    assert smooth(line[:50]).tolist() == line[:50].tolist()  # too few to smooth


def test_no_more_than_six_lines_and_the_others_are_their_mean() -> None:
    x = np.arange(3)
    lines = fold([Series(str(k), x, np.full(3, float(k))) for k in range(9)])
    assert [one.name for one in lines] == ["0", "1", "2", "3", "4", "mean of 4 others"]
    assert lines[-1].y.tolist() == [6.5] * 3
    assert len(fold(lines)) == 6


def test_the_report_of_a_run(watched, tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = copied(watched, tmp_path / "watched")
    said = run("report", folder)
    assert "176 in 39 steps" in said.stdout and "roll-back: 1" in said.stdout and "report.html" in said.stderr
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    names = {path.name for path in (folder / "report").glob("*.png")}
    themes = {"loss", "bits_per_byte", "sources", "norms", "learning_rate", "throughput"}
    assert names == {f"{theme}.png" for theme in themes}  # a loss scale of 1 is not drawn
    for name in names:
        data = (folder / "report" / name).read_bytes()
        with image.open(folder / "report" / name) as picture:
            assert picture.width == 1080 and 350 <= picture.height <= 1300
            assert len(picture.convert("L").getcolors()) > 3  # something is drawn
        assert base64.b64encode(data).decode() in page
    assert page.count("prefers-color-scheme: dark") == 1 + len(names) and 'name="viewport"' in page
    assert not re.search(r'https?://|<script|<link|src="(?!data:)', page)
    for words in ("the gradient is not finite", "samples 80 to 100 left out", "optimizer.learning_rate: 0.003 -&gt; 0.002"):
        assert words in page
    assert not list((folder / "report").glob(".*"))


def test_the_loss_scale_and_slow_ranks_are_drawn_where_there_are_any(tmp_path) -> None:
    folder = made_run(
        tmp_path / "many_$x_ranks",  # no TeX
        30,
        loss_scale=lambda k: 65_536.0 if k < 20 else 32_768.0,
        rank_seconds=lambda k: [1.0] * 11 + [1.6],
        stragglers=[11],
        sources=lambda k: {f"_source 源{n}": 3.0 + n for n in range(8)},
        loss=lambda k: math.nan if k == 3 else 5.0,
        steps=lambda k: {"samples": [8 * k + 4, 8 * k + 8], "loss": [4.0, 4.0], "gradient_norm": [1.0, 2.0]} if k > 9 else {},
    )
    events = [
        {"event": "alarm", "samples": 160, "why": "the loss scale fell to 128"},
        {"event": "left_out", "samples": 200, "until": 216},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (found,) = rows(run("report", folder, "--json", "--out", tmp_path / "out").stdout)
    assert "loss_scale.png" in {Path(path).name for path in found["figures"]}
    assert found["runs"][0]["loss"] == 4.0 and found["runs"][0]["interventions"] == {"alarm": 1, "left_out": 1}
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "the loss scale fell to 128" in page and "samples 200 to 216 left out" in page
    assert read_run(folder).each("loss")[0].tolist() == [8.0 * k for k in range(1, 11)] + [4.0 * k for k in range(21, 61)]
    assert found["runs"][0]["stragglers"] == {"11": 30} and found["page"] == str(tmp_path / "out/report.html")
    assert not (folder / "report").exists()
    # Drawn again without a scale, the old figure goes; what a person put there stays.
    (tmp_path / "out/notes.txt").write_text("mine")
    run("report", made_run(tmp_path / "plain", 1), "--out", tmp_path / "out")
    assert not (tmp_path / "out/loss_scale.png").exists() and (tmp_path / "out/notes.txt").exists()


def test_several_runs_over_each_other(tmp_path) -> None:
    one = made_run(tmp_path / "one", 40, bits_per_byte=lambda k: {"en": 2.0 - k // 10 * 0.1})
    two = made_run(tmp_path / "two", 20, loss=4.0)
    assert "--out" in refuse("report", one, two)
    assert "1 to 6 runs, not 7" in refuse("report", *[one] * 7, "--out", tmp_path / "out")
    (found,) = rows(run("report", one, two, "--out", tmp_path / "out", "--json").stdout)
    assert [values["run"] for values in found["runs"]] == ["one", "two"]
    assert {"loss.png", "bits_per_byte.png"} <= {Path(path).name for path in found["figures"]}
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<th>one</th><th>two</th>" in page


def test_nobody_elses_file_is_overwritten(tmp_path) -> None:
    folder = made_run(tmp_path / "run", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/loss.png").write_text("my picture")
    assert "`" + str(tmp_path / "mine/loss.png") + "` exists" in refuse("report", folder, "--out", tmp_path / "mine")
    assert (tmp_path / "mine/loss.png").read_text() == "my picture" and len(list((tmp_path / "mine").iterdir())) == 1
    assert "is a file" in refuse("report", folder, "--out", folder / "metrics.jsonl")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "openglm[watch]" in refuse("report", made_run(tmp_path / "run", 3))
    assert not (tmp_path / "run/report").exists()


# --- the view


def a_view(tmp_path: Path, recipe, width: int) -> tuple[TrainView, Console]:
    console = Console(record=True, width=width, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    return TrainView(recipe("run.samples=1000", "run.precision=float16", "run.log_every=2"), tmp_path, console=console), console


def shown(view: TrainView, width: int) -> list[str]:
    """What a terminal without colour shows."""
    console = Console(record=True, width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(view)
    return captured.get().rstrip("\n").splitlines()


@pytest.mark.parametrize("width", [40, 120])
def test_the_view_fits_the_terminal(recipe, watched, tmp_path, width) -> None:
    copied(watched, tmp_path / "run")
    (tmp_path / "run/snapshots/samples-0000000080").mkdir(parents=True)
    view, console = a_view(tmp_path / "run", recipe, width)
    groups = {"[MASK] en": (40.0, 10), "[gMASK] zh": (60.0, 12), "instruction en": (9.0, 3)}
    try:
        for step in range(1, 200):
            result = StepResult(5.0 - step / 100, groups, {}, 500, 25, 1.234, {}, 3e-4, 32_768.0)
            validation = {"en": 2.5, "zh": 3.5} if step < 100 else {"en": 2.25, "zh": 3.625}
            progress = Progress(samples=4 * step, steps=step, tokens=500 * step, validation=validation)
            view.watch(progress, result, 1500.0)
    finally:
        view.close()
    console.file.close()
    lines = shown(view, width)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines) and len(lines) <= (18 if width == 40 else 10)
    for words in (
        "796 of 1,000 samples, 79.6%",
        " left",
        "[MASK] en",
        "4.000",
        "2.2500  -0.2500",
        "3.6250",
        "+0.1250",
    ):
        assert words in text
    for words in ("1.23", "0.0003", "32,768", "1,500", "s ago", "█", "▁"):
        assert words in text
    assert re.search(r"interventions +2", text) and "last, at sample 96: roll-back" in text


def test_the_sparkline_shows_what_is_not_a_number() -> None:
    assert sparkline([1.0, 2.0, math.nan, 3.0]) == "▁▅x█" and sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""
    assert sparkline([1.0, 3.0], ascii_only=True) == "_#"


def test_a_resumed_view_remembers(recipe, watched, tmp_path) -> None:
    view, console = a_view(copied(watched, tmp_path / "run"), recipe, 100)
    last = read_run(tmp_path / "run").rows[-1]
    result = StepResult(4.0, {}, {}, 500, 25, 1.0, {}, 3e-4, 1.0)
    try:
        view.watch(Progress(samples=200, steps=51, validation=last["bits_per_byte"]), result, 1500.0)
        text = "\n".join(shown(view, 100))
    finally:
        view.close()
        console.file.close()
    assert len(set(text) & set("▁▂▃▄▅▆▇█")) > 3 and re.search(r"bits/byte en +\d\.\d{4} +[+-]0\.", text)


def test_on_a_terminal_the_view_is_shown(recipe, tmp_path) -> None:
    pty = pytest.importorskip("pty")
    read = recipe()
    lines = ["[model.changes]", *(f"{key} = {value}" for key, value in read.model.changes.items())]
    lines += ["[data]", f'corpus = "{read.data.corpus}"', f'tokenizer = "{read.data.tokenizer}"']
    lines += ["[objectives]", "window = 64", "long_window = 64"]
    lines += ["[run]", "samples = 48", "batch_size = 4", "micro_tokens = 256", "log_every = 1", "validation_windows = 1"]
    (tmp_path / "small.toml").write_text("\n".join(lines))

    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-m", "openglm", "train", "small.toml", "--out", "run", "--json"]
    process = subprocess.Popen(command, stderr=side, stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    os.close(side)
    pieces: list[bytes] = []
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(main, 65_536):
            pieces.append(piece)
    data, _ = process.communicate(timeout=60)
    os.close(main)
    shown = b"".join(pieces).decode(errors="replace")
    assert process.returncode == 0, shown
    assert "48 of 48 samples" in shown and "gradient norm" in shown
    assert [json.loads(line)["step"] for line in data.splitlines()[:-1]] == list(range(1, 13))  # data stays on stdout


def test_plain_dumb_and_mixed_output_have_one_line_of_progress(recipe, tmp_path, monkeypatch) -> None:
    def kind(*streams: str, **options: bool) -> str:
        with (
            terminal(monkeypatch, *streams),
            _progress(recipe(), tmp_path, **{"plain": False, "as_json": False, **options}) as it,
        ):
            return type(it).__name__

    monkeypatch.setenv("TERM", "xterm")
    assert kind("stderr") == kind("stderr", "stdout") == kind("stderr", as_json=True) == "TrainView"
    assert kind("stderr", plain=True) == kind() == "_Bar"
    assert kind("stderr", "stdout", as_json=True) == "_Bar"  # rows between the lines of the view
    monkeypatch.setenv("TERM", "dumb")
    assert kind("stderr") == "_Bar"


# --- mirrors


def test_trackers_of_a_recipe_are_known_names() -> None:
    assert read_recipe(None, ['run.trackers=["tensorboard", "trackio"]']).run.trackers == ("tensorboard", "trackio")
    assert read_recipe(None, ["run.trackers=trackio"]).run.trackers == ("trackio",)
    assert read_recipe(None, ["run.trackers=[]"]).run.trackers == ()
    with pytest.raises(ConfigError, match=r"`run\.trackers` does not know `tensorbord`; did you mean `tensorboard`"):
        read_recipe(None, ['run.trackers=["tensorbord"]'])
    with pytest.raises(ConfigError, match="must be a list of names"):
        read_recipe(None, ["run.trackers=3"])


def test_a_missing_package_is_told_before_anything_begins(recipe, tmp_path, monkeypatch) -> None:
    for name, extra, module in (("trackio", "trackio", "trackio"), ("tensorboard", "watch", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"names {name}, which is not installed; .*openglm\[{extra}\]"):
            train(recipe(f"run.trackers={name}"), tmp_path / "run", log=lambda _: None)
    assert not (tmp_path / "run").exists()
    check_trackers([])


def test_a_mirror_that_fails_does_not_end_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    trackers = Trackers(["tensorboard"], tmp_path, {}, said.append)
    trackers.row({"step": 1, "loss": 1.0})
    trackers.row({"step": 2, "loss": 1.0})
    trackers.close()
    assert len(said) == 1 and said[0].startswith("tensorboard failed and is left out")


def test_tensorboard_holds_the_scalars_and_the_events(watched) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = read_run(watched)
    found = EventAccumulator(str(watched / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in found.Scalars("loss")}
    assert [event.step for event in found.Scalars("loss")] == [row["step"] for row in read.rows]  # none twice
    assert scalars == pytest.approx({row["step"]: row["loss"] for row in read.rows}, rel=1e-5)
    assert {"gradient_norms/embedding", "bits_per_byte/en", "learning_rate"} <= set(found.Tags()["scalars"])
    texts = EventAccumulator(str(watched / "tensorboard/events")).Reload().Tensors("events/text_summary")
    said = b" ".join(text.tensor_proto.string_val[0] for text in texts).decode()
    assert "**skip**" in said and "**rollback**" in said and "**resume**" in said and "0.003 -> 0.002" in said


def test_trackio_gets_the_rows(tmp_path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys; from pathlib import Path; from openglm.training.trackers import Trackers; "
        "t = Trackers(['trackio'], Path(sys.argv[1]), {'run': {'seed': 1}}, lambda s: sys.exit(s)); "
        "t.row({'step': 1, 'loss': 2.5, 'losses': {'[MASK] en': 1.5}}); "
        "t.event({'event': 'skip', 'samples': 8, 'why': 'x'}); t.close(); "
        "import trackio; run, = trackio.Api().runs('openglm'); print('name', run.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mine")],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "db")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["name", "mine"]
