"""Schedules, loss scaling and the guard; and runs that recover by themselves from what was put into them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from openglm.data.loader import Loader
from openglm.data.schedule import batch_size_at, learning_rate_at, parse_schedule, value_at
from openglm.data.shards import write_shards
from openglm.errors import CheckpointError, ConfigError, TrainingError
from openglm.training.optimizer import moments
from openglm.training.recipe import StabilitySection, read_recipe
from openglm.training.report.reading import read_run
from openglm.training.run import train
from openglm.training.scaler import LossScaler
from openglm.training.stability import Edits, SpikeGuard
from openglm.training.step import Trainer

# --- schedules


def test_a_schedule_is_straight_between_its_points() -> None:
    schedule = parse_schedule([[100, 0.1], [300, 0.5], [400, 0.5]], "key")
    found = [value_at(schedule, samples) for samples in (0, 100, 200, 300, 350, 9999)]
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.5, 0.5])
    assert value_at(parse_schedule(2, "key"), 7) == 2.0


@pytest.mark.parametrize("value", ["0.1", True, [], [[1]], [[1, "x"]], [[5, 1.0], [5, 2.0]], [1, 2]])
def test_a_bad_schedule_names_its_key(value) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.x`"):
        parse_schedule(value, "optimizer.x")


def test_the_batch_of_the_130b_grows_as_it_did() -> None:
    # SPEC 9.1: 192 to 4,224, +24 every 32,697 samples, over 5,493,164 samples: 4,294 steps.
    ramp = (192, 24, 5_493_164)
    assert batch_size_at(4224, ramp, 0) == 192
    assert batch_size_at(4224, ramp, 32_697) == 192 and batch_size_at(4224, ramp, 32_698) == 216
    samples = steps = 0
    while samples < ramp[2]:
        samples += batch_size_at(4224, ramp, samples)
        steps += 1
    assert steps == pytest.approx(4294, abs=2)
    assert batch_size_at(4224, ramp, samples) == 4224
    assert batch_size_at(32, (), 5) == 32


def test_the_rate_of_the_130b() -> None:
    settings = {"rate": 8e-5, "least": 8e-6, "first": 1e-7, "warmup": 1_098_632, "decay": 197_753_905}
    assert learning_rate_at(0, **settings) == pytest.approx(1e-7, rel=1e-2)
    assert learning_rate_at(1_098_632, **settings) == pytest.approx(8e-5)
    assert learning_rate_at(250_000_000, **settings) == pytest.approx(8e-6)
    plain = learning_rate_at(50_000_000, **settings)
    climbing = [learning_rate_at(s, **settings, rewarm=[(50_000_000, 1000)]) for s in (50_000_000, 50_000_499, 50_001_000)]
    assert climbing == pytest.approx([plain / 1000, plain / 2, plain], rel=1e-3)


# --- the loss scale (SPEC 9.1)


def test_the_scale_falls_only_when_the_chances_are_used_up_and_grows_with_the_window() -> None:
    scaler = LossScaler(window=4)
    scales = []
    for overflow in [True, True, True, False, False, False, False, True, True, False, True]:
        scaler.update(overflow)
        scales.append(scaler.scale)
    #        chance   half    half    4 good steps: double and two chances   chance  half   good   half
    assert scales == [65536, 32768, 16384, 16384, 16384, 16384, 32768, 32768, 16384, 16384, 8192]
    for _ in range(40):
        scaler.update(True)
    assert scaler.scale == 1.0
    assert LossScaler(**scaler.state()) == scaler


def test_good_steps_count_from_the_last_overflow() -> None:
    scaler = LossScaler(window=4, scale=8.0)
    for overflow in [False, False, False, True, False, False, False]:
        scaler.update(overflow)
    assert scaler.scale == 8.0
    scaler.update(False)
    assert scaler.scale == 16.0


# --- the guard


def test_the_guard_skips_rolls_back_and_goes_on_after_a_restart() -> None:
    policy = StabilitySection(window=16, skip_norm=5.0, spike_loss=1.0, patience=2, most_skips=3)
    guard = SpikeGuard(policy)
    assert guard.judge(0, 100.0, 1e9)[0] == "step"  # nothing to compare with yet
    guard = SpikeGuard(policy)
    for step in range(10):
        assert guard.judge(step, 5.0, 1.0)[0] == "step"
    assert guard.judge(10, 5.0, 6.0) == ("skip", "gradient norm 6, the median is 1")
    assert guard.judge(11, float("nan"), 1.0)[0] == "skip"
    assert guard.judge(12, 5.1, float("inf"))[0] == "skip"
    assert guard.suspect == 10
    copy = SpikeGuard(policy)
    copy.restore(json.loads(json.dumps(guard.state())))
    for one in (guard, copy):
        assert one.judge(13, 5.0, 9.0)[0] == "rollback"
    guard = SpikeGuard(policy)
    for step in range(10):
        guard.judge(step, 5.0, 1.0)
    assert guard.judge(10, 6.5, 1.0)[0] == "step" and guard.suspect == 10
    assert guard.judge(11, 6.6, 1.0)[0] == "rollback"
    assert guard.judge(12, 5.0, 1.0)[0] == "step" and guard.suspect is None


def test_left_out_samples_are_jumped_over(tmp_path: Path) -> None:
    edits = Edits(skipped=[(30, 40), (10, 20), (20, 25)])
    assert [edits.position(n) for n in (9, 10, 19, 20, 25, 35, 40)] == [9, 25, 25, 25, 25, 40, 40]
    assert [edits.position(n, [(40, 60), (5, 10)]) for n in (9, 35, 60)] == [25, 60, 60]
    assert [edits.room(n, [(60, 61)]) for n in (5, 28, 40, 61)] == [5, 2, 20, math.inf]
    edits.save(tmp_path / "edits.json")
    assert Edits.load(tmp_path / "edits.json") == edits
    assert Edits.load(tmp_path / "none.json") == Edits()


@pytest.mark.parametrize("text", ["{", "[]", '{"rollback": 1}', '{"skipped": [[1]]}', '{"shrink": "x"}', '{"shrink": NaN}'])
def test_edits_that_no_run_wrote_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "edits.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"edits\.json` is not what a run wrote there; .*--fresh"):
        Edits.load(tmp_path / "edits.json")


# --- runs with something put into them

RUN = (
    "model.changes={num_layers=2,vocab_size=640,hidden_size=32,num_attention_heads=2,inner_hidden_size=64,max_sequence_length=128}",
    "objectives.window=64",
    "objectives.long_window=64",
    "run.batch_size=4",
    "run.micro_tokens=256",
    "run.validation_windows=1",
    "run.snapshot_every=5",
    "run.validate_every=100",
    "run.log_every=1",
    "run.precision=float32",
    "run.samples=160",
    "optimizer.learning_rate=0.003",
    "optimizer.warmup_samples=8",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_corpus, tiny_tokenizer_path):
    folder = tmp_path_factory.mktemp("prepared")
    write_shards([tiny_corpus], folder, tiny_tokenizer_path, workers=1)

    def make(*changes: str):
        data = (f'data.corpus="{folder}"', f'data.tokenizer="{tiny_tokenizer_path}"')
        return read_recipe(None, [*RUN, *data, *changes])

    return make


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, when, what) -> None:
    """Change the gradients of the steps that begin at some samples."""
    whole_step = Trainer.step

    def step(self, batch, *args, **options):
        forward_backward = self.model.forward_backward

        def poisoned(*inner):
            losses = forward_backward(*inner)
            if when(batch.first):
                what(self.model, losses)
            return losses

        self.model.forward_backward = poisoned
        try:
            return whole_step(self, batch, *args, **options)
        finally:
            del self.model.forward_backward

    monkeypatch.setattr(Trainer, "step", step)


def all_finite(out: Path) -> bool:
    from openglm.checkpoints import open_model

    source = open_model(out / "model")
    return all(torch.isfinite(source.tensor(name)).all() for name in source.names())


def test_a_nan_gradient_never_reaches_the_weights(recipe, tmp_path, monkeypatch) -> None:
    def put_nan(model, losses) -> None:
        next(iter(model.weights().values())).grad[3, 5] = float("nan")

    poison(monkeypatch, lambda first: first in (40, 80), put_nan)
    train(recipe(), tmp_path, log=lambda _: None)
    assert [(e["event"], e["samples"], e["why"]) for e in events(tmp_path)] == [
        ("skip", 40, "the gradient is not finite"),
        ("skip", 80, "the gradient is not finite"),
    ]
    assert all_finite(tmp_path) and rows(tmp_path)[-1]["samples"] == 160


def test_weights_that_are_not_finite_are_never_written(recipe, tmp_path, monkeypatch) -> None:
    train(recipe("run.samples=20"), tmp_path, log=lambda _: None)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def ruin(model, losses) -> None:  # behind the guard's back, in the step before a snapshot
        next(iter(model.weights().values())).data[3, 5] = math.inf

    poison(monkeypatch, lambda first: first == 36, ruin)
    with pytest.raises(TrainingError, match=r"not finite at sample 40 \(`word_embeddings\.weight`\), so they are not saved"):
        train(recipe("run.samples=48"), tmp_path, log=lambda _: None)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["samples-0000000020"]
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    monkeypatch.undo()
    train(recipe("run.samples=48"), tmp_path, log=lambda _: None)
    assert all_finite(tmp_path) and rows(tmp_path)[-1]["samples"] == 48


def test_a_poisoned_batch_is_skipped(recipe, tmp_path, monkeypatch) -> None:
    def blow_up(model, losses) -> None:
        model.scale_gradients(1e4)

    poison(monkeypatch, lambda first: first == 100, blow_up)
    train(recipe("stability.skip_norm=20.0"), tmp_path, log=lambda _: None)
    (event,) = events(tmp_path)
    assert (event["event"], event["samples"]) == ("skip", 100) and "gradient norm" in event["why"]


def test_an_exploding_loss_rolls_back_and_leaves_the_samples_out(recipe, tmp_path, monkeypatch) -> None:
    def ruin(model, losses) -> None:
        for loss in losses:
            loss += 50.0

    # Samples 92 to 116 are bad wherever they are met.
    poison(monkeypatch, lambda first: 92 <= first < 116, ruin)
    said: list[str] = []
    policy = ("stability.spike_loss=2.0", "stability.shrink=0.5", "stability.rewarm_samples=16", "stability.patience=2")
    train(recipe(*policy), tmp_path, log=said.append)
    assert any("rolled back to `samples-0000000080`, leaving out samples 80 to 100" in line for line in said)
    edits = Edits.load(tmp_path / "edits.json")
    # The range was longer than one jump: a second roll-back leaves out the rest.
    assert edits.skipped[0] == (80, 100) and edits.position(80) >= 116 and edits.shrink <= 0.25
    assert [r["loss"] < 20 for r in rows(tmp_path)] == [True] * len(rows(tmp_path))
    assert rows(tmp_path)[-1]["samples"] == 160 and all_finite(tmp_path)
    start = edits.rewarm[-1][0]
    rates = {r["samples"] - 4: r["learning_rate"] for r in rows(tmp_path)}
    assert rates[start] < rates[start + 8] < rates[start + 12]


def test_ranges_of_a_recipe_are_left_out_to_the_sample(recipe, tmp_path, monkeypatch) -> None:
    taken: list[tuple[int, int]] = []
    make = Loader.batch

    def batch(self, first, size, *rest):
        taken.append((first, size))
        return make(self, first, size, *rest)

    monkeypatch.setattr(Loader, "batch", batch)
    train(recipe("run.samples=40", "run.snapshot_every=1"), tmp_path, log=lambda _: None)
    said: list[str] = []
    # In the middle of a run that is taken up again, and to its end.
    train(recipe("run.samples=80", "data.skip=[[46, 57], [70, 200]]"), tmp_path, log=said.append)
    assert taken[-7:] == [(36, 4), (40, 4), (44, 2), (57, 4), (61, 4), (65, 4), (69, 1)]
    resumed, left_out = events(tmp_path)
    assert "data.skip: [] -> [[46, 57], [70, 200]]" in resumed["changes"]
    assert (left_out["event"], left_out["samples"], left_out["until"]) == ("left_out", 46, 57)
    assert "samples 46 to 57 are left out: data.skip" in said and not any("stopped" in line for line in said)
    assert rows(tmp_path)[-1]["samples"] == 70 and rows(tmp_path)[-1]["bits_per_byte"]


def test_every_step_is_in_the_metrics_whatever_the_interval(recipe, tmp_path) -> None:
    short = ("run.samples=64", "run.snapshot_every=7")
    train(recipe(*short), tmp_path / "each", log=lambda _: None)
    each = {row["samples"]: row for row in rows(tmp_path / "each")}

    class Stop(Exception):
        pass

    def stop(progress, result, speed):
        if progress.steps == 10:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(*short, "run.log_every=3"), tmp_path / "third", log=lambda _: None, watch=stop)
    train(recipe(*short, "run.log_every=3"), tmp_path / "third", log=lambda _: None)
    assert [row["step"] for row in rows(tmp_path / "third")] == [3, 6, 7, 9, 12, 14, 15, 16]
    run = read_run(tmp_path / "third")
    for key in ("loss", "gradient_norm", "loss_scale"):
        samples, values = run.each(key)
        assert samples.tolist() == list(each) and values.tolist() == [row[key] for row in each.values()]
    embedding = [row["gradient_norms"]["embedding"] for row in each.values()]
    assert [norm for row in run.rows if "steps" in row for norm in row["steps"]["embedding_norm"]] == [
        norm for place, norm in enumerate(embedding, 1) if place not in (7, 15, 16)
    ]
    assert all(len(row["steps"]["seconds"]) > 1 for row in run.rows if "steps" in row)


def test_a_run_that_cannot_be_saved_says_so(recipe, tmp_path, monkeypatch) -> None:
    def put_nan(model, losses) -> None:
        model.scale_gradients(math.nan)

    poison(monkeypatch, lambda first: first >= 40, put_nan)
    with pytest.raises(TrainingError, match=r"diverges at sample .* rolled back 2 times already") as caught:
        train(recipe("stability.most_skips=2", "stability.most_rollbacks=2"), tmp_path, log=lambda _: None)
    assert "the same command" in str(caught.value.hint)
    # The weights in the last snapshot are good: without the cause the run goes on.
    monkeypatch.undo()
    train(recipe(), tmp_path, log=lambda _: None)
    assert all_finite(tmp_path)


def test_float16_takes_a_chance_then_halves_the_scale(recipe, tmp_path, monkeypatch) -> None:
    def overflow(model, losses) -> None:
        next(iter(model.weights().values())).grad[0, 0] = float("inf")

    poison(monkeypatch, lambda first: first in (20, 28), overflow)
    whole_step, unharmed = Trainer.step, []

    def state(trainer: Trainer) -> list[torch.Tensor]:
        weights = trainer.model.weights().values()
        kept = [weights, trainer.model.working, *(moments(trainer.optimizer, p).values() for p in weights)]
        return [tensor.detach().clone() for tensors in kept for tensor in tensors]

    def step(self, batch, *args, **options):
        before = state(self)
        result = whole_step(self, batch, *args, **options)
        if all(torch.equal(a, b) for a, b in zip(before, state(self), strict=True)):
            unharmed.append(batch.first)
        return result

    monkeypatch.setattr(Trainer, "step", step)
    short = ("run.precision=float16", "run.samples=48", "stability.alarm_scale=32768")
    train(recipe(*short), tmp_path, log=lambda _: None)
    assert unharmed == [20, 28]  # weights and moments, bit for bit
    assert [(e["event"], e["samples"]) for e in events(tmp_path)] == [("skip", 20), ("skip", 28), ("alarm", 28)]
    assert events(tmp_path)[-1]["why"] == "the loss scale fell to 32768"
    scales = {row["samples"] - 4: row["loss_scale"] for row in rows(tmp_path)}
    assert scales[16] == scales[24] == scales[28] == 65536 and scales[32] == 32768
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0]


def test_dropout_masks_are_a_function_of_the_sample_number(recipe, tmp_path) -> None:
    dropped = ("optimizer.hidden_dropout=0.1", "optimizer.attention_dropout=[[0, 0.0], [40, 0.1]]", "run.samples=80")
    train(recipe(*dropped), tmp_path / "whole", log=lambda _: None)

    class Stop(Exception):
        pass

    def stop(progress, result, speed):
        if progress.steps == 13:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(*dropped), tmp_path / "halted", log=lambda _: None, watch=stop)
    torch.manual_seed(99)
    train(recipe(*dropped), tmp_path / "halted", log=lambda _: None)
    a, b = ({r["step"]: r["loss"] for r in rows(tmp_path / run)} for run in ("whole", "halted"))
    assert a == b
    train(recipe("run.samples=80"), tmp_path / "plain", log=lambda _: None)
    assert [r["loss"] for r in rows(tmp_path / "plain")] != list(a.values())
