"""The training wing: recipes, the step against its plain twin, and runs that go on as if nothing had happened."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openglm.checkpoints import open_model
from openglm.config import MASK_KINDS, ModelConfig
from openglm.data.loader import Rows, make_batch
from openglm.data.mixture import Mixture, Objectives
from openglm.data.shards import digest, open_shards, write_shards
from openglm.errors import CheckpointError, ConfigError, DataError, OpenGLMError, StorageError
from openglm.infilling import NO_TARGET, Batch
from openglm.models.glm130b import GLM130B
from openglm.storage import exclusive
from openglm.tokenizers import load_tokenizer
from openglm.training.head_start import give_head_start
from openglm.training.model import MasterWeights
from openglm.training.ranks import Ranks
from openglm.training.recipe import Recipe, learning_rate, read_recipe
from openglm.training.run import build_model, train
from openglm.training.step import Trainer
from openglm.training.validation import bits_per_byte, network_losses
from openglm.version import __version__

TINY = (
    "model.changes={num_layers=2,vocab_size=640,hidden_size=32,num_attention_heads=2,inner_hidden_size=64,max_sequence_length=128}",
    "objectives.window=64",
    "objectives.long_window=128",
    "run.batch_size=4",
    "run.micro_tokens=256",
    "run.validation_windows=2",
    "run.snapshot_every=3",
    "run.validate_every=5",
    "run.log_every=1",
    "run.precision=float32",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_samples=8",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_corpus, tiny_tokenizer_path):
    folder = tmp_path_factory.mktemp("prepared")
    write_shards([tiny_corpus], folder, tiny_tokenizer_path, workers=1)
    return folder


@pytest.fixture(scope="module")
def recipe(prepared, tiny_tokenizer_path):
    def make(*changes: str) -> Recipe:
        data = (f'data.corpus="{prepared}"', f'data.tokenizer="{tiny_tokenizer_path}"')
        return read_recipe(None, [*TINY, *data, *changes])

    return make


# --- recipes


def test_recipes_of_the_repository_are_valid(request):
    recipes = sorted((request.config.rootpath / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path).model.config().parameter_count > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run.sample=3", "did you mean `samples`"),
        ("runn.samples=3", "did you mean `run`"),
        ("run.samples=many", "`run.samples` is 'many'"),
        ("run.samples=0", "must be at least 1"),
        ("run.precision=float8", "run.precision"),
        ("run.log_every=0", "`run.log_every` is 0"),
        ("objectives.mean_span=0", "`objectives.mean_span` is 0"),
        ("objectives.generation_share=1.5", "`objectives.generation_share` is 1.5"),
        ("objectives.sentence_share=0.5", "`objectives.sentence_share` is 0.5, but must be in 0..1 together with"),
        ("data.skip=[[40, 30]]", r"`data.skip` is \[\[40, 30\]\], but must be ranges"),
        ("stability.alarm_scale=-1", "`stability.alarm_scale` is -1"),
        ("model.preset=nanno", "did you mean `nano`"),
        ("objectives.window=4096", "the model's context of 1024"),
        ("samples", "section.key=value"),
        ("model.changes.special_tokens=5", "`model.changes` cannot be used"),
        ("model.embedding_scale=-1", "`model.embedding_scale` is -1.0, but must be at least 0"),
        ("data.weights.zh=[[0, 1], [9, inf]]", "`data.weights.zh` is inf, but must be a finite number"),
        ("objectives.long_window=0", "`objectives.long_window` is 0, but must be at least 32"),
        ("optimizer.betas=[1.5, 0.9]", "`optimizer.betas`"),
        ("optimizer.clip_norm=-1", "`optimizer.clip_norm` is -1.0, but must be above 0"),
        ("optimizer.epsilon=-1", "`optimizer.epsilon`"),
        ("optimizer.first_learning_rate=-1", "`optimizer.first_learning_rate`"),
        ("optimizer.least_learning_rate=nan", "`optimizer.least_learning_rate` is nan, but must be a finite number"),
        ("optimizer.rewarm=[[4, -3]]", "`optimizer.rewarm`"),
        ("optimizer.rewarm=5", r"`optimizer.rewarm` is 5, but must be pairs"),
        ("optimizer.weight_decay=-1", "`optimizer.weight_decay`"),
        ("parallel.timeout=-1", "`parallel.timeout` is -1.0"),
        ("run.batch_ramp=[2.5, 1.5, 8]", "`run.batch_ramp`.* in whole numbers"),
        ("run.keep_every=-1", "`run.keep_every`"),
        ("run.micro_tokens=-5", "`run.micro_tokens` is -5, but must be at least 1"),
        ("run.samples=" + "9" * 5000, "`run.samples`"),
        ("run.seed=-1", "`run.seed` is -1, but must be at least 0"),
        ("run.seed=18446744073709551616", "`run.seed`"),
        ("stability.shrink=-2", "`stability.shrink`"),
        ("stability.skip_norm=-1", "`stability.skip_norm`"),
        ("stability.spike_loss=nan", "`stability.spike_loss`"),
    ],
)
def test_bad_recipes_name_the_key(change, words):
    with pytest.raises(ConfigError, match=words):
        read_recipe(None, [change])


def test_rows_of_a_pack_take_every_sample() -> None:
    short = ("objectives.window=256", "objectives.long_window=128")
    assert read_recipe(None, short).objectives.long_window == 128
    with pytest.raises(ConfigError, match=r"`objectives\.long_window` is 128, but must be at least objectives\.window"):
        read_recipe(None, [*short, "run.aggregate=true"])


def test_the_largest_seed_with_dropout(recipe, tmp_path):
    train(recipe("run.samples=8", f"run.seed={2**64 - 1}", "optimizer.hidden_dropout=0.1"), tmp_path, log=lambda _: None)
    assert rows(tmp_path)[-1]["samples"] == 8


def test_a_change_reaches_a_key_within_a_table() -> None:
    recipe = read_recipe(None, ["model.changes.num_layers=3", "data.weights.zh-law=0.5", "run.samples=7"])
    assert recipe.model.config().num_layers == 3 and recipe.data.weights == {"zh-law": 0.5} and recipe.run.samples == 7
    assert read_recipe(None, ['data.weights."web.2024"=3']).data.weights == {"web.2024": 3}
    with pytest.raises(ConfigError, match="not of the form"):
        read_recipe(None, ["run..samples=7"])
    with pytest.raises(ConfigError, match=r"`samples` in `run\.samples\.x=1` is no table"):
        read_recipe(None, ["run.samples=7", "run.samples.x=1"])


def test_a_change_goes_before_the_patterns_of_a_recipe(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text('[data.weights]\n"*-technical" = 0.5\n"zh" = 2.0\n')
    recipe = read_recipe(tmp_path / "recipe.toml", ["data.weights.my-technical=3", "data.weights.zh=1"])
    assert list(recipe.data.weights.items()) == [("zh", 1), ("my-technical", 3), ("*-technical", 0.5)]


def test_a_bad_recipe_file_is_named(tmp_path):
    path = tmp_path / "r.toml"
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*r\.toml"):
        read_recipe(path)
    path.write_text("[run\n")
    with pytest.raises(ConfigError, match=r"r\.toml` is not valid TOML"):
        read_recipe(path)
    path.write_text("[run]\nsample = 3\n")
    with pytest.raises(ConfigError, match=r"r\.toml`: a recipe has no key `run.sample`"):
        read_recipe(path)


def test_the_rate_warms_up_and_falls_as_a_cosine(recipe):
    r = recipe("run.samples=1008", "optimizer.least_learning_rate=0.001")
    assert learning_rate(r, 0) < learning_rate(r, 4) < learning_rate(r, 8)
    assert learning_rate(r, 8) == pytest.approx(0.01)
    assert learning_rate(r, 508) == pytest.approx((0.01 + 0.001) / 2)
    assert learning_rate(r, 1008) == pytest.approx(0.001) and learning_rate(r, 5000) == pytest.approx(0.001)


# --- the step


def small_mixture(prepared, tokenizer_path):
    shards = [s for s in open_shards(prepared) if not s.info.name.startswith("validation")]
    return Mixture(shards, load_tokenizer(tokenizer_path), Objectives(window=64, long_window=64), seed=1)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_step_is_one_adamw_update_of_the_mean_loss(recipe, prepared, tiny_tokenizer_path, recompute):
    r = recipe("optimizer.clip_norm=0.05", "run.samples=100", f"parallel.recompute={str(recompute).lower()}")
    config = r.model.config()
    mixture = small_mixture(prepared, tiny_tokenizer_path)
    batch = make_batch(mixture, 16, 6, Rows(128))
    assert len(batch.micro_batches) > 1
    model = build_model(r, config, mixture, Ranks())
    assert isinstance(model, MasterWeights)
    network, calls = model.network, []
    network.initialize(3)
    network.layers["0"].get_submodule("attention").register_forward_hook(lambda *_: calls.append(1))
    result = Trainer(model, r, Ranks()).step(batch, Rows(128))
    assert len(calls) == len(batch.micro_batches) * (2 if recompute else 1)

    # The twin: all samples in one batch, every row through the vocabulary, plain AdamW.
    twin = GLM130B(config).initialize(3)
    whole = Batch.stack([mixture.sample(16 + i).layout for i in range(6)])
    assert whole.targets is not None
    logits = twin(whole.tokens, whole.positions, whole.mask)
    loss = F.cross_entropy(logits.flatten(0, 1), whole.targets.flatten(), ignore_index=NO_TARGET)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    o = r.optimizer
    groups = [
        {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in twin.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=learning_rate(r, 16), betas=o.betas, eps=o.epsilon).step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    assert sum(count for _, count in result.groups.values()) == batch.targets
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_bfloat16_keeps_exact_master_weights(recipe, prepared, tiny_tokenizer_path):
    r = recipe("optimizer.learning_rate=1e-6", "optimizer.warmup_samples=1")
    network = GLM130B(r.model.config()).initialize(3)
    before = [p.detach().clone() for p in network.parameters()]
    weights = MasterWeights(network, "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(before, weights.master, strict=True))
    batch = make_batch(small_mixture(prepared, tiny_tokenizer_path), 16, 4, Rows(256))
    Trainer(weights, r, Ranks()).step(batch, Rows(256))
    # An update below bfloat16's resolution is kept in the master weights, and the working copy is their rounding.
    assert any((a != b).any() for a, b in zip(before, weights.master, strict=True))
    for master, working in zip(weights.master, weights.working, strict=True):
        assert working.dtype == torch.bfloat16 and torch.equal(master.bfloat16(), working)


# --- runs


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stable(row):
    return {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}


def test_a_run_learns_and_its_checkpoint_opens(recipe, tmp_path):
    folder = train(recipe("run.samples=160", "run.precision=bfloat16"), tmp_path, log=lambda _: None)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    source = open_model(folder)
    assert source.config.learned_masks == ("[MASK]", "[gMASK]")
    assert source.tensor("word_embeddings.weight").dtype == torch.float16
    assert rows(tmp_path)[-1]["bits_per_byte"].keys() == {"en", "zh"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(recipe, tmp_path, optimizer):
    chosen = recipe("run.samples=40", f"optimizer.name={optimizer}")
    train(chosen, tmp_path / "whole", log=lambda _: None)

    class Stop(Exception):
        pass

    def stop_at_step_5(progress, result, speed):
        if progress.steps == 5:
            raise Stop

    with pytest.raises(Stop):
        train(chosen, tmp_path / "halted", log=lambda _: None, watch=stop_at_step_5)
    said: list[str] = []
    train(chosen, tmp_path / "halted", log=said.append)
    assert any("resumed from `samples-0000000012`" in line for line in said)
    whole = {row["step"]: stable(row) for row in rows(tmp_path / "whole")}
    halted = {row["step"]: stable(row) for row in rows(tmp_path / "halted")}
    for step in range(6, 11):  # step 5 validated in one run only after its metrics were due
        assert whole[step]["loss"] == halted[step]["loss"] and whole[step]["gradient_norm"] == halted[step]["gradient_norm"]
    for name in open_model(tmp_path / "whole/model").names():
        a, b = (open_model(tmp_path / run / "model").tensor(name) for run in ("whole", "halted"))
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run of 24 samples with snapshots at 12 and 24; each test gets a copy."""
    folder = tmp_path_factory.mktemp("finished")
    train(recipe("run.samples=24"), folder, log=lambda _: None)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def flip_a_bit(snapshot):
    file = next((snapshot / "tensors").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def edit_state(**changes):
    def edit(snapshot):
        state = json.loads((snapshot / "state.json").read_text())
        (snapshot / "state.json").write_text(json.dumps({k: v for k, v in {**state, **changes}.items() if v is not None}))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda snapshot: (snapshot / "state.json").write_text('{"format_ver'),
        edit_state(trainer=None),
        edit_state(progress={"sample": 3}),
        edit_state(sha256={}),
        edit_state(format_version="x"),
    ],
    ids=["tensors", "torn", "no trainer", "progress", "no checksums", "format"],
)
def test_a_damaged_snapshot_is_passed_over_and_told(recipe, run, damage):
    damage(run / "snapshots" / "samples-0000000024")
    said: list[str] = []
    train(recipe("run.samples=24"), run, log=said.append)
    assert any("resumed from `samples-0000000012`" in line for line in said)
    assert "the snapshot `samples-0000000024` is damaged and was passed over" in said
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["samples"]) for e in events] == [("resume", 12), ("damaged", 12)]
    assert "`samples-0000000024`" in events[1]["why"]
    assert [row["samples"] for row in rows(run)] == [4, 8, 12, 16, 20, 24]


def test_a_run_whose_snapshots_are_all_damaged_does_not_begin_anew(recipe, run):
    for path in (run / "snapshots").iterdir():
        flip_a_bit(path)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"every snapshot in .* is damaged .*--fresh"):
        train(recipe("run.samples=28"), run, log=lambda _: None)
    assert contents(run) == before


def test_a_snapshot_whose_state_cannot_be_read_is_named(recipe, run):
    edit_state(trainer={"guard": {"losses": 5}})(run / "snapshots" / "samples-0000000024")
    with pytest.raises(CheckpointError, match=r"samples-0000000024.state\.json` is not what a run wrote .* remove this"):
        train(recipe("run.samples=28"), run, log=lambda _: None)


def test_a_snapshot_of_a_newer_format_is_refused_and_stays(recipe, tmp_path):
    train(recipe("run.samples=12"), tmp_path, log=lambda _: None)
    (state,) = (tmp_path / "snapshots").glob("*/state.json")
    state.write_text(state.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="has format 99, newer than this program's 2; update openglm"):
        train(recipe("run.samples=24"), tmp_path, log=lambda _: None)
    state.write_text(state.read_text().replace('"format_version": 99', '"format_version": 1'))
    with pytest.raises(CheckpointError, match=r"has format 1; this program reads 2; go on from the run's model"):
        train(recipe("run.samples=24"), tmp_path, log=lambda _: None)
    assert state.is_file()


def test_a_torn_row_of_metrics_is_made_anew(recipe, tmp_path):
    train(recipe("run.samples=24"), tmp_path, log=lambda _: None)
    whole = [stable(row) for row in rows(tmp_path)]
    shutil.rmtree(tmp_path / "snapshots" / "samples-0000000024")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "samp')  # killed while it wrote
    train(recipe("run.samples=24"), tmp_path, log=lambda _: None)
    again = [stable(row) for row in rows(tmp_path)]
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]


def test_old_snapshots_are_kept_by_the_policy(recipe, tmp_path):
    train(recipe("run.samples=120", "run.keep_snapshots=2", "run.keep_every=50"), tmp_path, log=lambda _: None)
    kept = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "snapshots").glob("samples-*"))
    assert kept == [12, 60, 108, 120]  # the first of each 50, and the newest two


def test_metrics_tell_all_that_is_watched(recipe, tmp_path):
    train(recipe("run.samples=12"), tmp_path, log=lambda _: None)
    row = rows(tmp_path)[-1]
    groups = {"embedding", "final norm", "layers 0-9"}
    assert row["gradient_norms"].keys() == groups and row["update_norms"].keys() == groups
    assert row["gradient_norm"] == pytest.approx(sum(v**2 for v in row["gradient_norms"].values()) ** 0.5, rel=1e-3)
    assert {"en", "zh", "chat"} >= row["sources"].keys() and row["loss_scale"] == 1.0


@pytest.fixture(scope="module")
def bad(prepared, tiny_corpus, tiny_tokenizer, tmp_path_factory):
    """A folder with `damaged` shards, and `other` ones with their own tokenizer."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(prepared, folder / "damaged")
    data = bytearray((folder / "damaged" / "en.tokens").read_bytes())
    data[1000] ^= 1
    (folder / "damaged" / "en.tokens").write_bytes(data)
    shutil.copy(tiny_tokenizer.path, folder / "other.model")
    write_shards([tiny_corpus], folder / "other", folder / "other.model", workers=1)
    return folder


def shape(**changes):
    """The change of a recipe that makes a network of another shape."""
    text = TINY[0]
    for key, value in changes.items():
        text = re.sub(rf"{key}=\d+", f"{key}={value}", text)
    return text


@pytest.mark.parametrize(
    ("fresh", "changes", "words"),
    [
        (False, (shape(num_layers=1),), "is of another model: its `num_layers` is 2, not 1; give another --out, or --fresh"),
        (False, (shape(num_attention_heads=4),), "is of another model: its `num_attention_heads` is 2, not 4"),
        (False, (shape(hidden_size=64),), "is of another model: its `hidden_size` is 32, not 64"),
        (False, ('data.corpus="BAD/other"', 'data.tokenizer="BAD/other.model"'), "its tokenizer is another one"),
        (True, ('data.corpus="BAD/nothing"',), "there is no file or folder"),
        (True, ('data.corpus="BAD/damaged"',), r"en\.tokens` is damaged"),
        (True, ('data.tokenizer="BAD/nothing"',), "BAD/nothing"),
        (True, (shape(vocab_size=64),), "more than the network's vocabulary of 64"),
        (True, ("data.weights.*=[[0, 0.0], [8, 1.0]]",), "every source has weight 0 at sample 0"),
        (True, ('model.initial="BAD/nothing"',), "BAD/nothing"),
    ],
    ids=["layers", "heads", "width", "tokenizer", "no data", "shard", "no tokenizer", "vocabulary", "weights", "initial"],
)
def test_what_is_refused_leaves_the_run_as_it_was(recipe, run, bad, fresh, changes, words):
    before = contents(run)
    with pytest.raises(OpenGLMError, match=words.replace("BAD", str(bad))):
        given = [change.replace("BAD", str(bad)) for change in changes]
        train(recipe("run.samples=28", *given), run, fresh=fresh, log=lambda _: None)
    assert contents(run) == before


def test_a_fresh_run_may_be_of_another_model(recipe, run):
    (run / "edits.json").write_text("what is removed need not be read")
    train(recipe("run.samples=8", shape(num_layers=1)), run, fresh=True, log=lambda _: None)
    assert [row["samples"] for row in rows(run)] == [4, 8] and not (run / "edits.json").exists()
    assert [path.name for path in (run / "snapshots").iterdir()] == ["samples-0000000008"]
    assert open_model(run / "model").config.num_layers == 1


def test_a_snapshot_that_does_not_say_of_which_model_it_is(recipe, run):
    for path in (run / "snapshots").iterdir():
        edit_state(model=None, made_with=None)(path)
    with pytest.raises(CheckpointError, match=r"is of another model: this one has no `layers\.1\."):
        train(recipe("run.samples=28", shape(num_layers=1)), run, log=lambda _: None)
    said: list[str] = []
    train(recipe("run.samples=28"), run, log=said.append)
    assert [line for line in said if "changed" in line] == ["changed since then: run.samples: 24 -> 28"]


def test_other_text_under_the_same_names_is_told(recipe, run, prepared, tiny_corpus, tiny_tokenizer_path, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    with open(tmp_path / "corpus" / "en.jsonl", "a") as file:
        file.write('{"text": "One more text."}\n')
    write_shards([tmp_path / "corpus"], tmp_path / "tokens", tiny_tokenizer_path, workers=1)
    said: list[str] = []
    train(recipe("run.samples=28", f'data.corpus="{tmp_path / "tokens"}"'), run, log=said.append)
    old, new = digest(open_shards(prepared)), digest(open_shards(tmp_path / "tokens"))
    assert old != new and f"changed since then: shards: {old} -> {new}" in said
    (event,) = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert f"shards: {old} -> {new}" in event["changes"]
    (state,) = (run / "snapshots").glob("*28/state.json")
    assert json.loads(state.read_text())["made_with"] == {"openglm": __version__, "torch": torch.__version__, "shards": new}


def test_a_resumed_run_says_what_changed(recipe, tmp_path):
    train(recipe("run.samples=4"), tmp_path, log=lambda _: None)
    said: list[str] = []
    train(recipe("run.samples=8", "optimizer.clip_norm=0.5"), tmp_path, log=said.append)
    assert "changed since then: optimizer.clip_norm: 1.0 -> 0.5" in said
    assert "changed since then: run.samples: 4 -> 8" in said


def test_muon_moves_matrices_by_their_orthogonalized_momentum(recipe, prepared, tiny_tokenizer_path):
    r = recipe("optimizer.name=muon", "optimizer.weight_decay=0", "optimizer.warmup_samples=1")
    network = GLM130B(r.model.config()).initialize(3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer = Trainer(MasterWeights(network, "float32"), r, Ranks())
    batch = make_batch(small_mixture(prepared, tiny_tokenizer_path), 16, 6, Rows(128))
    rate = trainer.step(batch, Rows(128)).learning_rate
    for name, parameter in network.named_parameters():
        update = (parameter.detach() - before[name]) / rate
        if name.startswith("layers.") and name.endswith(".weight") and "layernorm" not in name:
            # All directions move alike, and by as much as AdamW would: 0.2 of the rate, in the mean over the numbers.
            singular = torch.linalg.svdvals(update)
            assert singular.max() < 3 * singular.median(), name
            assert 0.1 < update.square().mean().sqrt() < 0.3, name
        elif not name.endswith("bias"):
            assert update.abs().max() < 1.1, name  # Adam's first step is the sign


def test_two_runs_never_share_a_folder(recipe, tmp_path):
    with exclusive(tmp_path / "run", ""), pytest.raises(StorageError, match=r"`.*run` is in use by another process"):
        train(recipe("run.samples=4"), tmp_path / "run", log=lambda _: None)
    train(recipe("run.samples=4"), tmp_path / "run", log=lambda _: None)
    with pytest.raises(OpenGLMError):  # what fails holds nothing
        train(recipe("run.samples=8", "run.batch_size=3", "parallel.data=2"), tmp_path / "run", log=lambda _: None)
    train(recipe("run.samples=8"), tmp_path / "run", log=lambda _: None)


def test_a_run_may_change_its_optimizer(recipe, tmp_path):
    train(recipe("run.samples=8"), tmp_path, log=lambda _: None)
    for samples, name, old in ((16, "muon", "adamw"), (24, "adamw", "muon")):
        said: list[str] = []
        train(recipe(f"run.samples={samples}", f"optimizer.name={name}"), tmp_path, log=said.append)
        assert f"changed since then: optimizer.name: {old} -> {name}" in said
    assert rows(tmp_path)[-1]["samples"] == 24


def test_a_run_starts_from_a_checkpoint(recipe, tmp_path):
    first = train(recipe("run.samples=40"), tmp_path / "first", log=lambda _: None)
    rate = "optimizer.learning_rate=0.0"
    least = "optimizer.least_learning_rate=0.0"
    second = train(recipe("run.samples=4", f'model.initial="{first}"', rate, least), tmp_path / "second", log=lambda _: None)
    for name in open_model(first).names():
        assert torch.equal(open_model(first).tensor(name), open_model(second).tensor(name))


def test_a_damaged_token_shard_is_named_before_the_first_step(tmp_path, tiny_corpus, tiny_tokenizer_path) -> None:
    write_shards([tiny_corpus], tmp_path / "tokens", tiny_tokenizer_path, workers=1)
    path = tmp_path / "tokens" / "en.tokens"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    given = (*TINY, f'data.corpus="{tmp_path / "tokens"}"', f'data.tokenizer="{tiny_tokenizer_path}"', "run.samples=4")
    with pytest.raises(DataError, match=r"en\.tokens` is damaged"):
        train(read_recipe(None, given), tmp_path / "run", log=lambda _: None)
    assert not (tmp_path / "run" / "model").exists() and not list(tmp_path.glob("run/snapshots/*"))
    train(read_recipe(None, [*given, "data.verify=false"]), tmp_path / "run", log=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "masks"),
    [
        (("objectives.unidirectional=true",), ("[gMASK]",)),
        (("objectives.generation_share=1",), ("[MASK]", "[gMASK]")),  # of the instructions
        (
            ("objectives.generation_share=0.7", "objectives.sentence_share=0.3", "objectives.instruction_share=0"),
            MASK_KINDS[1:],
        ),
    ],
)
def test_a_model_knows_the_masks_of_its_samples(recipe, tmp_path, changes, masks) -> None:
    model = train(recipe("run.samples=4", *changes), tmp_path, log=lambda _: None)
    assert open_model(model).config.learned_masks == masks


def test_patterns_that_fit_no_source_are_told(recipe, tmp_path):
    patterns = ("data.weights.zhh=2", "data.weights.z*=3", "data.weights.laws=1", "data.caps.chta=9")
    said: list[str] = []
    train(recipe("run.samples=4", *patterns), tmp_path, log=said.append)
    assert [line for line in said if "no source" in line] == [
        "no source of the training data fits `laws`, `zhh` (did you mean `zh`?) in data.weights",
        "no source of the training data fits `chta` (did you mean `chat`?) in data.caps",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the corpus `.*` is empty: its files hold no document"),
        ('{"text": "whole"}\n{"tex', "is not valid JSON"),
    ],
    ids=["empty", "torn"],
)
def test_a_corpus_that_cannot_be_used_leaves_nothing_behind(tmp_path, tiny_tokenizer_path, text, words):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "en.jsonl").write_text(text)
    given = (*TINY, f'data.corpus="{tmp_path / "corpus"}"', f'data.tokenizer="{tiny_tokenizer_path}"')
    with pytest.raises(DataError, match=words):
        train(read_recipe(None, given), tmp_path / "run", log=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_a_broken_index_or_shard_of_a_run_is_named(tmp_path, tiny_corpus, tiny_tokenizer_path):
    recipe = read_recipe(None, (*TINY, f'data.corpus="{tiny_corpus}"', f'data.tokenizer="{tiny_tokenizer_path}"'))
    write_shards([tiny_corpus], tmp_path / "tokens", tiny_tokenizer_path, workers=1)
    offsets = tmp_path / "tokens" / "en.offsets"
    count = offsets.stat().st_size // 8
    offsets.write_bytes(offsets.read_bytes()[:-8])
    with pytest.raises(DataError, match=rf"en\.offsets` holds {count - 1} offsets, not {count}; prepare the data again"):
        train(recipe, tmp_path, log=lambda _: None)
    index = tmp_path / "tokens" / "shards.json"
    whole = index.read_text()
    for broken in (whole[:100], "[]", whole.replace("uint16", "text"), re.sub(r'"tokens": \d+', '"tokens": "x"', whole)):
        index.write_text(broken)
        with pytest.raises(DataError, match=r"shards\.json` is not an index of token shards; remove that folder"):
            train(recipe, tmp_path, log=lambda _: None)


# --- validation


def test_bits_per_byte_is_the_sum_over_windows(tiny_tokenizer_path):
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    config = ModelConfig(2, 32, 2, 64, vocab_size=tokenizer.vocab_size, max_sequence_length=64)
    network = GLM130B(config).initialize(0).eval()
    document = np.asarray(tokenizer.encode("The cat sat on the mat. 今天天气很好。" * 2))[:40]
    expected = 0.0
    for start in range(0, len(document), 16):
        piece = document[start : start + 16].tolist()
        ids = torch.tensor([[config.special_tokens["[gMASK]"], config.special_tokens["sop"], *piece]])
        causal = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        log_p = network(ids, torch.arange(ids.shape[1])[None], causal).double().log_softmax(-1)
        expected -= sum(log_p[0, 1 + k, token].item() for k, token in enumerate(piece))
    size = len(tokenizer.decode(document.tolist()).encode())
    found = bits_per_byte(network_losses(network), [document], tokenizer, window=16)
    assert found == pytest.approx(expected / np.log(2) / size, rel=1e-5)


# --- the head start


def test_the_head_start_is_the_frequency_of_each_token_and_leaves_the_layers_alone():
    config = ModelConfig(2, 32, 2, 64, vocab_size=640, max_sequence_length=64)
    counts = np.random.default_rng(0).zipf(1.5, 640).clip(max=10_000)
    network = GLM130B(config).initialize(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            give_head_start(name, parameter, counts, embedding_scale=1e-6)  # so that nothing else speaks
    tokens = torch.randint(0, 640, (2, 12))
    positions = torch.arange(12).expand(2, 12)
    log_p = network(tokens, positions).log_softmax(-1)
    expected = torch.from_numpy(np.log((counts + 0.5) / (counts + 0.5).sum())).float()
    torch.testing.assert_close(log_p, expected.expand_as(log_p), rtol=0, atol=1e-3)
    # The layers do not see the coordinate that holds it.
    first = network.layers["0"].input_layernorm(network.word_embeddings(tokens))
    assert first[..., 0].abs().max() == 0


def test_a_run_with_a_head_start_begins_below_chance(recipe, tmp_path):
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    train(recipe("run.samples=4"), plain, log=lambda _: None)
    train(recipe("run.samples=4", "model.head_start=true", "model.embedding_scale=0.5"), ahead, log=lambda _: None)
    assert rows(ahead)[0]["loss"] < rows(plain)[0]["loss"] - 0.3


# --- the tour of docs/training.md


def test_the_tour_from_texts_to_a_filled_blank(request, tmp_path, monkeypatch):
    """The script, the recipe and the very commands of the page, in fewer steps."""
    page = (request.config.rootpath / "docs" / "training.md").read_text(encoding="utf-8")
    tour = page.partition("## From a folder of texts")[2].partition("\n## ")[0]
    script, toml = (re.search(f"^```{kind}\n(.*?)^```", tour, re.M | re.S) for kind in ("python", "toml"))
    assert script and toml
    monkeypatch.chdir(tmp_path)
    exec(script[1], {})
    fewer = re.sub(r"^samples = .*", "samples = 64", toml[1], flags=re.M)
    assert fewer != toml[1]
    Path("small.toml").write_text(fewer, encoding="utf-8")
    commands = [shlex.split(line)[2:] for line in tour.splitlines() if line.startswith("$ glm ")]
    said = [command_line.run(*command) for command in commands]
    steps = [" ".join(command[: 2 if command[0] in ("tokenizer", "data") else 1]) for command in commands]
    assert list(dict.fromkeys(steps)) == ["tokenizer train", "data prepare", "data inspect", "train", "fill", "report"]
    for command, shown in zip(commands, said, strict=True):
        if command[0] == "fill":
            before, after = command[-1].split("[MASK]")
            assert shown.stdout.startswith(before) and shown.stdout.endswith(after + "\n")
    assert rows(Path("runs/small"))[-1]["bits_per_byte"].keys() == {"en"}
    assert Path("runs/small/report/report.html").is_file()
