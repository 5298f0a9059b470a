"""Whole runs on several processes: the same losses as one, snapshots that load on any layout."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from openglm.checkpoints import open_model
from openglm.data.loader import Loader
from openglm.data.mixture import Mixture
from openglm.data.schedule import value_at
from openglm.data.shards import open_shards, write_shards
from openglm.errors import TrainingError
from openglm.models.glm130b import GLM130B, GeGLU
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.tensor import local
from openglm.tokenizers import load_tokenizer
from openglm.training.metrics import stragglers
from openglm.training.model import ShardedModel, TrainingModel
from openglm.training.optimizer import moments
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
        if step % 3 == 0:  # validated here and there; in between rows repeat the last one, which a stop may have brought
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
    # Four data ranks by two tensor ranks begin, others go on, in the middle of the ramp.
    half = ("run.samples=18", "optimizer.decay_samples=48")
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
        assert any("resumed from `samples-0000000018`" in line for line in said)
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


@contextlib.contextmanager
def behind_backward(what: Callable[[int, TrainingModel, list[torch.Tensor]], None]) -> Iterator[None]:
    """Trouble: ``what`` is called behind each backward pass with the step's first sample, the model and the losses."""
    step = Trainer.step

    def troubled(self, batch, *arguments, **options):
        forward_backward = self.model.forward_backward

        def then(*inner):
            losses = forward_backward(*inner)
            what(batch.first, self.model, losses)
            return losses

        self.model.forward_backward = then
        try:
            return step(self, batch, *arguments, **options)
        finally:
            del self.model.forward_backward

    Trainer.step = troubled
    try:
        yield
    finally:
        Trainer.step = step


def put(value: float, model: TrainingModel) -> None:
    """Into a gradient of a layer: the tied matrix's is the same at both ends by now."""
    weight = next(weight for name, weight in model.weights().items() if name.endswith("dense.weight"))
    local(weight.grad).view(-1)[0] = value


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Weights and moments of this process."""
    weights = trainer.model.weights().values()
    kept = [weights, *(moments(trainer.optimizer, p).values() for p in weights)]
    return [local(tensor.detach()).clone() for tensors in kept for tensor in tensors]


def run_with_overflows(layout: ParallelLayout, out: Path, changes: tuple[str, ...], rank: int) -> list:
    """A run in which a gradient overflows on one process in the second and fourth step; of each step on this process:
    verdict, loss scale, and whether weights and moments stayed as they were."""
    seen: list[tuple[str, float, bool]] = []
    step = Trainer.step

    def overflow(first: int, model: TrainingModel, losses: list[torch.Tensor]) -> None:
        if first in (8, 24) and torch.distributed.get_rank() == rank:
            put(float("inf"), model)

    def watched(self, *arguments, **options):
        before = state_of(self)
        result = step(self, *arguments, **options)
        same = all(torch.equal(a, b) for a, b in zip(before, state_of(self), strict=True))
        seen.append((result.verdict, result.loss_scale, same))
        return result

    Trainer.step = watched
    try:
        with behind_backward(overflow):
            run(layout, out, changes)
    finally:
        Trainer.step = step
    return seen


@pytest.mark.parametrize("rank", [0, 7])
def test_an_overflow_on_one_rank_of_one_stage_skips_the_step_on_all(workers, data, tmp_path, rank) -> None:
    layout = ParallelLayout(data=2, tensor=2, pipeline=2)
    short = ("run.precision=float16", "run.batch_ramp=[]", "run.samples=40", "run.validate_every=100", "run.snapshot_every=100")
    all_seen = workers.run(8, run_with_overflows, layout, tmp_path, (*data, *short), rank)
    assert all_seen == [all_seen[0]] * 8
    verdicts, scales, unharmed = zip(*all_seen[0], strict=True)
    assert verdicts == ("step", "skip", "step", "skip", "step")
    assert unharmed == (False, True, False, True, False)
    # The first overflow takes a chance, the second halves the scale.
    assert scales == (65_536.0, 65_536.0, 65_536.0, 65_536.0, 32_768.0)


def run_with_trouble(layout: ParallelLayout, out: Path, changes: tuple[str, ...]) -> list[tuple]:
    """A run in which rank 1 meets a NaN at sample 40, and losses that explode wherever it meets samples 60 to 72. Of each
    step on this process: first sample, verdict, factor of the embedding's gradient, rate."""
    seen: list[tuple[int, str, float, float]] = []
    step = Trainer.step

    def trouble(first: int, model: TrainingModel, losses: list[torch.Tensor]) -> None:
        if torch.distributed.get_rank() != 1:
            return
        if first == 40:
            put(float("nan"), model)
        if 60 <= first < 72:
            for loss in losses:
                loss += 50.0

    def watched(self, batch, *arguments, **options):
        result = step(self, batch, *arguments, **options)
        assert all(torch.isfinite(tensor).all() for tensor in state_of(self))
        seen.append((batch.first, result.verdict, self.model.network.input_gradient_factor, result.learning_rate))
        return result

    Trainer.step = watched
    try:
        with behind_backward(trouble):
            run(layout, out, changes)
    finally:
        Trainer.step = step
    return seen


def test_all_ranks_skip_and_roll_back_alike(workers, data, tmp_path) -> None:
    schedule = "optimizer.input_gradient_factor=[[0, 0.1], [80, 0.9]]"
    policy = ("stability.spike_loss=2.0", "stability.patience=2", "stability.shrink=0.5", "stability.rewarm_samples=16")
    often = ("run.samples=96", "run.batch_size=4", "run.batch_ramp=[]", "run.snapshot_every=5", "run.validate_every=100")
    one, other = workers.run(2, run_with_trouble, ParallelLayout(data=2), tmp_path, (*data, *often, *policy, schedule))
    assert one == other
    assert [(first, verdict) for first, verdict, _, _ in one if verdict != "step"] == [(40, "skip"), (64, "rollback")]
    firsts = [first for first, *_ in one]
    assert firsts == [*range(0, 68, 4), *range(68, 96, 4)]  # back to 60, and 60 to 68 left out
    for number, (first, _, factor, _) in enumerate(one):
        plain = value_at(((0.0, 0.1), (80.0, 0.9)), first)
        assert factor == pytest.approx(plain if number < 17 else 0.5 * plain)
    rates = [rate for *_, rate in one[17:]]
    assert rates[:4] == sorted(rates[:4]) and rates[0] < 0.5 * rates[3]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "step"] == ["skip", "rollback", "rollback"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_stopped_in_the_middle_of_a_ramp_goes_on_bit_for_bit(data, tmp_path, precision) -> None:
    chosen = read_recipe(None, [*data, f"run.precision={precision}"])

    def overflow(first: int, model: TrainingModel, losses: list[torch.Tensor]) -> None:
        if precision == "float16" and first in (4, 8):  # a chance is taken, the scale is halved
            put(float("inf"), model)

    count = itertools.count(1)
    with behind_backward(overflow):
        train(chosen, tmp_path / "whole", log=lambda _: None)
        train(chosen, tmp_path / "halted", log=lambda _: None, should_stop=lambda: next(count) == 4)
        said: list[str] = []
        train(chosen, tmp_path / "halted", log=said.append)
    assert any("resumed from `samples-0000000018`" in line for line in said)  # of a ramp that ends at 24
    whole, halted = (
        [(r["samples"], r["loss"], r["gradient_norm"], r["gradient_norms"], r["loss_scale"]) for r in rows(tmp_path / name)]
        for name in ("whole", "halted")
    )
    assert whole == halted and whole[-1][-1] == (32_768 if precision == "float16" else 1)
    states = [next((tmp_path / name).glob("snapshots/samples-0000000048/state.json")) for name in ("whole", "halted")]
    assert json.loads(states[0].read_text())["trainer"] == json.loads(states[1].read_text())["trainer"]
    one, other = (open_model(tmp_path / name / "model") for name in ("whole", "halted"))
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names())


# --- slow ranks, and ranks that hang


@pytest.mark.parametrize(
    ("layout", "times", "named"),
    [
        (ParallelLayout(data=2), [0.2, 0.7], [1]),
        (ParallelLayout(data=2), [0.2, 0.25], []),
        (ParallelLayout(data=2, tensor=2), [1.0, 1.1, 1.2, 1.5], [3]),
        (ParallelLayout(data=2, pipeline=2), [1.0, 1.0, 3.0, 3.1], []),  # stages have unlike amounts of work
        (ParallelLayout(data=2, pipeline=2), [1.5, 1.0, 3.0, 5.0], [0, 3]),
        (ParallelLayout(pipeline=4), [2.0, 4.0, 4.0, 2.0], []),  # 12 layers are 2, 4, 4, 2
        (ParallelLayout(pipeline=4), [2.0, 4.0, 4.0, 4.0], [3]),
    ],
    ids=str,
)
def test_stragglers_are_slower_than_others_with_the_same_work(layout: ParallelLayout, times, named) -> None:
    assert stragglers(times, layout, 12) == named


def run_with_a_slow_rank(layout: ParallelLayout, out: Path, changes: tuple[str, ...], slow: type, method: str) -> None:
    """A run in which rank 1 sleeps in each call of a method."""
    real = getattr(slow, method)

    def slowed(self, *arguments, **options):
        if torch.distributed.get_rank() == 1:
            time.sleep(0.05 if slow is GeGLU else 0.5)
        return real(self, *arguments, **options)

    setattr(slow, method, slowed)
    try:
        run(layout, out, changes)
    finally:
        setattr(slow, method, real)


@pytest.mark.parametrize(
    ("layout", "slow", "method"),
    [
        (ParallelLayout(data=2), Loader, "batch"),
        (ParallelLayout(data=2), ShardedModel, "forward_backward"),
        (ParallelLayout(data=2), GeGLU, "forward"),
        (ParallelLayout(tensor=2), GeGLU, "forward"),
        (ParallelLayout(pipeline=2), GeGLU, "forward"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_a_slow_rank_is_named(workers, data, tmp_path, layout: ParallelLayout, slow: type, method: str) -> None:
    short = ("run.samples=8", "run.log_every=2", "run.validation_windows=1", "run.snapshot_every=100")
    workers.run(2, run_with_a_slow_rank, layout, tmp_path, (*data, *short), slow, method)
    (row,) = rows(tmp_path)
    assert row["stragglers"] == [1], row["rank_seconds"]


def run_with_a_hung_rank(layout: ParallelLayout, out: Path, changes: tuple[str, ...], rank: int) -> str:
    """What a process says of a run in which one sleeps in its third step until the others have given up."""

    def sleep(first: int, model: TrainingModel, losses: list[torch.Tensor]) -> None:
        if first == 8 and torch.distributed.get_rank() == rank:
            time.sleep(6.0)
            raise TrainingError("awake")

    try:
        with behind_backward(sleep):
            run(layout, out, (*changes, "parallel.timeout=3.0"))
    except TrainingError as error:
        return str(error)
    return ""


def test_a_hung_rank_is_named_on_any_axis(workers, data, tmp_path) -> None:
    said = workers.run(4, run_with_a_hung_rank, ParallelLayout(data=2, tensor=2), tmp_path, data, 3)
    workers.end(4)  # they have lost each other
    assert all("rank 3 no longer answers" in said[rank] for rank in range(3)), said
