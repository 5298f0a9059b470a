"""Whole runs on several processes: the same losses as one, snapshots that load on any layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from openglm.checkpoints import open_model
from openglm.data.mixture import Mixture
from openglm.data.shards import open_shards, write_shards
from openglm.models.glm130b import GLM130B
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.tensor import local
from openglm.tokenizers import load_tokenizer
from openglm.training.model import ShardedModel, TrainingModel
from openglm.training.ranks import connect
from openglm.training.recipe import read_recipe
from openglm.training.run import build_model, train
from openglm.training.step import Trainer

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


def built(layout: ParallelLayout, changes: tuple[str, ...]) -> TrainingModel:
    os.environ["WORLD_SIZE"] = str(layout.world_size)
    parallel = (f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}")
    recipe = read_recipe(None, [*changes, *parallel])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    mixture = Mixture(open_shards(recipe.data.corpus), tokenizer, recipe.objectives, seed=recipe.run.seed)
    return build_model(recipe, recipe.model.config(), mixture, connect(recipe))


def first_weights(layout: ParallelLayout, changes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in built(layout, changes).whole_weights()}


@pytest.mark.parametrize(
    ("start", "layout"),
    [
        ("fresh", ParallelLayout(pipeline=2)),
        ("head start", ParallelLayout(tensor=2)),
        ("checkpoint", ParallelLayout(data=2)),
    ],
    ids=str,
)
def test_a_run_begins_with_the_same_weights_on_any_layout(workers, data, alone, start: str, layout: ParallelLayout) -> None:
    begin = {
        "fresh": (),
        "head start": ("model.head_start=true", "model.embedding_scale=0.5"),
        "checkpoint": (f'model.initial="{alone / "model"}"',),
    }
    changes = (*data, *begin[start])
    expected = first_weights(ParallelLayout(), changes)
    found: dict[str, torch.Tensor] = {}
    for weights in workers.run(2, first_weights, layout, changes):
        found |= weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if start == "fresh":
        recipe = read_recipe(None, list(changes))
        network = GLM130B(recipe.model.config()).initialize(recipe.run.seed)
        assert all(torch.equal(found[name], parameter) for name, parameter in network.named_parameters())


def memory_to_build(layout: ParallelLayout, changes: tuple[str, ...]) -> tuple[int, int]:
    """Bytes by which building the model raised this process's memory, at the most; and bytes of all float32 weights."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    model = built(layout, changes)
    return status("VmHWM") - before, 4 * model.network.config.parameter_count


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is asked of Linux")
def test_no_process_ever_holds_the_whole_network(workers, data) -> None:
    shape = "num_layers=16,vocab_size=640,hidden_size=512,num_attention_heads=4,inner_hidden_size=2048,max_sequence_length=128"
    changes = (*data, f"model.changes={{{shape}}}")
    for peak, whole in workers.run(2, memory_to_build, ParallelLayout(data=2), changes):
        assert 0.5 * whole < peak < 0.75 * whole  # its half, and one matrix


def run_with_overflows(layout: ParallelLayout, out: Path, changes: tuple[str, ...], rank: int, steps: tuple[int, ...]) -> list:
    """A run in which a gradient overflows on one process in some steps (from 0); of each step on this process: verdict,
    loss scale, and whether the weights stayed as they were."""
    seen: list[tuple[str, float, bool]] = []
    backward, step = ShardedModel.forward_backward, Trainer.step

    def overflowing(self, *arguments):
        losses = backward(self, *arguments)
        if len(seen) in steps and torch.distributed.get_rank() == rank:
            # Of a layer: the tied matrix's gradient is the same at both ends by now.
            weight = next(weight for name, weight in self.weights().items() if name.endswith("dense.weight"))
            local(weight.grad).view(-1)[0] = float("inf")
        return losses

    def watched(self, *arguments, **options):
        before = [local(p.detach()).clone() for p in self.model.weights().values()]
        result = step(self, *arguments, **options)
        after = [local(p.detach()) for p in self.model.weights().values()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen.append((result.verdict, result.loss_scale, same))
        return result

    ShardedModel.forward_backward, Trainer.step = overflowing, watched
    try:
        run(layout, out, changes)
    finally:
        ShardedModel.forward_backward, Trainer.step = backward, step
    return seen


@pytest.mark.parametrize("rank", [0, 7])
def test_an_overflow_on_one_rank_of_one_stage_skips_the_step_on_all(workers, data, tmp_path, rank) -> None:
    layout = ParallelLayout(data=2, tensor=2, pipeline=2)
    short = ("run.precision=float16", "run.batch_ramp=[]", "run.samples=40", "run.validate_every=100", "run.snapshot_every=100")
    all_seen = workers.run(8, run_with_overflows, layout, tmp_path, (*data, *short), rank, (1, 3))
    assert all_seen == [all_seen[0]] * 8
    verdicts, scales, unharmed = zip(*all_seen[0], strict=True)
    assert verdicts == ("step", "skip", "step", "skip", "step")
    assert unharmed == (False, True, False, True, False)
    # The first overflow takes a chance, the second halves the scale.
    assert scales == (65_536.0, 65_536.0, 65_536.0, 65_536.0, 32_768.0)
