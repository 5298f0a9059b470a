"""Runs that are killed, in real processes: nothing is lost, and the loss curve is as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import processes

from openglm.checkpoints import open_model
from openglm.data.shards import write_shards
from openglm.training.recipe import read_recipe
from openglm.training.run import train

RECIPE = """
[model.changes]
num_layers = 2
vocab_size = 640
hidden_size = 32
num_attention_heads = 2
inner_hidden_size = 64
max_sequence_length = 128
[objectives]
window = 64
long_window = 64
[optimizer]
learning_rate = 0.003
warmup_samples = 8
[run]
samples = 240
batch_size = 4
micro_tokens = 256
precision = "float32"
threads = 1
snapshot_every = 4
validate_every = 1000
validation_windows = 1
log_every = 1
[stability]
skip_norm = 50.0
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_corpus, tiny_tokenizer_path) -> list[str]:
    folder = tmp_path_factory.mktemp("recipe")
    write_shards([tiny_corpus], folder / "tokens", tiny_tokenizer_path, workers=1)
    (folder / "recipe.toml").write_text(RECIPE)
    given = ["--data", str(folder / "tokens"), "--tokenizer", str(tiny_tokenizer_path)]
    return ["-m", "openglm", "train", str(folder / "recipe.toml"), *given, "--out"]


def start(command: list[str], out: Path, *launcher: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *launcher, *command, str(out)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def train_here(command: list[str], out: Path, *, processes: int = 1, stop_at: int | None = None) -> None:
    """What the command does, in this process, as one of several."""
    if processes > 1:
        os.environ["WORLD_SIZE"] = str(processes)
    recipe = read_recipe(Path(command[3]), [f'data.corpus="{command[5]}"', f'data.tokenizer="{command[7]}"'])
    steps = itertools.count(1)
    train(recipe, out, log=lambda _: None, should_stop=lambda: next(steps) == stop_at)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train_here(command, out)
    return out


def train_beside(command: list[str], out: Path) -> None:
    train_here(command, out, processes=2)


@pytest.fixture(scope="module")
def undisturbed_on_two(command, tmp_path_factory, workers) -> Path:
    out = tmp_path_factory.mktemp("undisturbed-on-two")
    workers.run(2, train_beside, command, out)
    return out


def curve(out: Path) -> dict[int, tuple]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: (row["loss"], row["gradient_norm"]) for row in map(json.loads, lines)}


def assert_equal_bit_for_bit(out: Path, undisturbed: Path) -> None:
    assert curve(out) == curve(undisturbed)
    one, other = open_model(out / "model"), open_model(undisturbed / "model")
    for name in other.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name


def kill_when(process: subprocess.Popen, ready, timeout: float = 120.0) -> bool:
    """Kill -9 as soon as ``ready()``; False if the process ended before."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if process.poll() is not None:
            process.communicate()
            return False
        if ready():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    raise AssertionError("never ready to be killed")


def test_three_kills_change_nothing(command, undisturbed, tmp_path) -> None:
    snapshots = tmp_path / "snapshots"

    def steps() -> int:
        metrics = tmp_path / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    # Between two snapshots; in the middle of saving one; and before the first step of a resumed run is done.
    assert kill_when(start(command, tmp_path), lambda: steps() >= 6 and any(snapshots.glob("samples-*")))
    assert kill_when(start(command, tmp_path), lambda: steps() > 8 and any(snapshots.glob(".samples-*.part/tensors/*")))
    assert kill_when(start(command, tmp_path), lambda: (tmp_path / "events.jsonl").read_text().count("resume") >= 2)
    said = finish(start(command, tmp_path))
    assert "resumed from" in said
    assert not list(snapshots.glob(".*"))  # what was half written is gone
    assert_equal_bit_for_bit(tmp_path, undisturbed)


@pytest.mark.slow
def test_twenty_kills_at_random_times(command, undisturbed, tmp_path) -> None:
    rng = random.Random(0)
    for _ in range(20):
        process = start(command, tmp_path)
        time.sleep(rng.uniform(1.0, 6.0))
        process.kill()
        process.communicate()
    finish(start(command, tmp_path))
    assert_equal_bit_for_bit(tmp_path, undisturbed)


def workers_of(launcher: subprocess.Popen) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def wait(process: subprocess.Popen, ready: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_hung_rank_and_a_lost_one_change_nothing(command, undisturbed_on_two, tmp_path, rank) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = start([*command[:-1], "--set", "parallel.timeout=5.0", "--out"], tmp_path, *launcher)
    wait(process, lambda: list((tmp_path / "snapshots").glob("samples-*")))
    workers = workers_of(process)
    os.kill(workers[rank], signal.SIGSTOP)
    wait(process, lambda: workers[1 - rank] not in workers_of(process))
    os.kill(workers[rank], signal.SIGCONT)  # else torchrun waits half a minute for it to obey
    events = tmp_path / "events.jsonl"
    wait(process, lambda: events.is_file() and "resume" in events.read_text())
    os.kill(workers_of(process)[rank], signal.SIGKILL)
    said = finish(process)
    assert f"error: rank {rank} no longer answers" in said
    assert events.read_text().count('"resume"') == 2
    assert_equal_bit_for_bit(tmp_path, undisturbed_on_two)


@pytest.mark.skipif(os.name == "nt", reason="no file size limit")
def test_a_disk_that_is_full_in_mid_save(command, undisturbed, tmp_path) -> None:
    import resource

    train_here(command, tmp_path, stop_at=5)
    kept = ("snapshots", "model")
    before = {path: path.read_bytes() for name in kept for path in (tmp_path / name).rglob("*") if path.is_file()}
    process = subprocess.Popen(
        [sys.executable, *command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),  # smaller than a snapshot
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "cannot write the snapshot" in error and "Traceback" not in said
    # Nothing half written is left, what was good is untouched, and with room again the run goes on from there.
    after = {path: path.read_bytes() for name in kept for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert after == before and tmp_path / "snapshots/samples-0000000020/state.json" in after
    train_here(command, tmp_path)
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["snapshot"] == "samples-0000000020"
    assert_equal_bit_for_bit(tmp_path, undisturbed)


def test_one_process_tells_what_is_wrong(command, tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("mine\n")  # which the first process alone reads
    first, second = processes(2, *command[2:], out, folders=[tmp_path])
    assert first[:2] == (2, "") and "metrics.jsonl` line 1 is not a JSON object" in first[2]
    assert first[2].count("error:") == 1 and "Traceback" not in first[2]
    assert second == (2, "", "")
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "lock"}
