"""Whole runs on several processes: the same losses as one, snapshots that load on any layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from openglm.checkpoints import open_model
from openglm.data.shards import write_shards
from openglm.parallel.layout import ParallelLayout
from openglm.training.recipe import read_recipe
from openglm.training.run import train

SHAPE = (
    "model.changes={num_layers=4,vocab_size=640,hidden_size=32,num_attention_heads=4,inner_hidden_size=48,max_sequence_length=128}",
    "objectives.window=48",
    "objectives.long_window=96",
    "run.batch_size=8",
    "run.batch_ramp=[4, 2, 24]",
    "run.micro_tokens=192",
    "run.aggregate=true",
    "run.validation_windows=2",
    "run.snapshot_every=3",
    "run.validate_every=3",
    "run.log_every=1",
    "run.precision=float32",
    "run.samples=48",
    "optimizer.learning_rate=0.003",
    "optimizer.warmup_samples=8",
    "optimizer.input_gradient_factor=[[0, 0.1], [48, 1.0]]",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_corpus, tiny_tokenizer_path) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("prepared")
    write_shards([tiny_corpus], folder, tiny_tokenizer_path, workers=1)
    return (*SHAPE, f'data.corpus="{folder}"', f'data.tokenizer="{tiny_tokenizer_path}"')


def run(layout: ParallelLayout, out: Path, changes: tuple[str, ...]) -> list[str]:
    """What the lead says."""
    os.environ["WORLD_SIZE"] = str(layout.world_size)
    parallel = (f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}")
    said: list[str] = []
    train(read_recipe(None, [*changes, *parallel]), out, log=said.append)
    return said


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, workers) -> Path:
    out = tmp_path_factory.mktemp("alone")
    train(read_recipe(None, list(data)), out, log=lambda _: None)
    return out


def assert_same_run(out: Path, alone: Path, from_step: int = 1) -> None:
    expected = {row["step"]: row for row in rows(alone)}
    found = {row["step"]: row for row in rows(out)}
    assert found.keys() == expected.keys()
    for step in range(from_step, len(expected) + 1):
        a, b = found[step], expected[step]
        assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        assert a["sources"] == pytest.approx(b["sources"], rel=1e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a["gradient_norms"] == pytest.approx(b["gradient_norms"], rel=1e-3)
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], abs=2e-4)
    one, other = open_model(out / "model"), open_model(alone / "model")
    for name in other.names():
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(data=2),
        ParallelLayout(tensor=2),
        ParallelLayout(pipeline=2),
        ParallelLayout(data=3),
        ParallelLayout(data=2, tensor=2, pipeline=2),
    ],
    ids=str,
)
def test_a_run_is_the_same_on_any_layout(workers, data, alone, tmp_path, layout: ParallelLayout) -> None:
    workers.run(layout.world_size, run, layout, tmp_path, data)
    assert_same_run(tmp_path, alone)


def test_snapshots_load_on_any_layout(workers, data, alone, tmp_path) -> None:
    # Four data ranks by two tensor ranks begin, others go on.
    half = ("run.samples=32", "optimizer.decay_samples=48")
    begun = tmp_path / "begun"
    workers.run(8, run, ParallelLayout(data=4, tensor=2), begun, (*data, *half))
    steps = len(rows(begun))
    for layout in (ParallelLayout(), ParallelLayout(tensor=4), ParallelLayout(data=2), ParallelLayout(pipeline=2)):
        out = tmp_path / str(layout).replace(" ", "")
        out.mkdir()
        shutil.copytree(begun, out, dirs_exist_ok=True)
        if layout.world_size == 1:
            os.environ.pop("WORLD_SIZE", None)
            said: list[str] = []
            train(read_recipe(None, [*data]), out, log=said.append)
        else:
            said = workers.run(layout.world_size, run, layout, out, data)[0]
        assert any("resumed from `samples-0000000032`" in line for line in said)
        assert_same_run(out, alone, from_step=steps + 1)
