"""The training wing: recipes, the step against its plain twin, and runs that go on as if nothing had happened."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openglm.checkpoints import open_model
from openglm.config import MASK_KINDS, ModelConfig
from openglm.data.loader import Rows, make_batch
from openglm.data.mixture import Mixture, Objectives
from openglm.data.shards import open_shards, write_shards
from openglm.errors import CheckpointError, ConfigError, DataError, OpenGLMError, StorageError
from openglm.infilling import NO_TARGET, Batch
from openglm.models.glm130b import GLM130B
from openglm.storage import exclusive
from openglm.tokenizers import load_tokenizer
from openglm.training.head_start import give_head_start
from openglm.training.model import MasterWeights
from openglm.training.ranks import Ranks
from openglm.training.recipe import Recipe, learning_rate, read_recipe
from openglm.training.run import train
from openglm.training.snapshots import Snapshots
from openglm.training.step import Trainer
from openglm.training.validation import bits_per_byte, network_losses

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


@pytest.fixture
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
    ],
)
def test_bad_recipes_name_the_key(change, words):
    with pytest.raises(ConfigError, match=words):
        read_recipe(None, [change])


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


def test_the_step_is_one_adamw_update_of_the_mean_loss(recipe, prepared, tiny_tokenizer_path):
    r = recipe("optimizer.clip_norm=0.05", "run.samples=100")
    config = r.model.config()
    mixture = small_mixture(prepared, tiny_tokenizer_path)
    batch = make_batch(mixture, 16, 6, Rows(128))
    assert len(batch.micro_batches) > 1
    network = GLM130B(config).initialize(3)
    result = Trainer(MasterWeights(network, "float32"), r, Ranks()).step(batch, Rows(128))

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


def test_a_damaged_snapshot_is_passed_over(recipe, tmp_path):
    train(recipe("run.samples=24"), tmp_path, log=lambda _: None)
    found = Snapshots(tmp_path / "snapshots", Ranks(), keep=2).newest()
    assert found is not None and found[0].name == "samples-0000000024"
    file = next((found[0] / "tensors").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    found = Snapshots(tmp_path / "snapshots", Ranks(), keep=2).newest()
    assert found is not None and found[0].name == "samples-0000000012"
    shutil.rmtree(found[0])
    assert Snapshots(tmp_path / "snapshots", Ranks(), keep=2).newest() is None


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


def test_a_snapshot_of_another_network_is_refused(recipe, tmp_path):
    train(recipe("run.samples=4"), tmp_path, log=lambda _: None)
    wider = TINY[0].replace("hidden_size=32", "hidden_size=64", 1)
    with pytest.raises(CheckpointError, match="is of another network"):
        train(recipe("run.samples=8", wider), tmp_path, log=lambda _: None)
    train(recipe("run.samples=8", wider), tmp_path, fresh=True, log=lambda _: None)


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


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(recipe, tmp_path):
    small = TINY[0].replace("vocab_size=640", "vocab_size=64")
    with pytest.raises(ConfigError, match="more than the network's vocabulary of 64"):
        train(recipe(small), tmp_path, log=lambda _: None)


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
