"""3D parallelism against one process: loss, every gradient, the norm, weights; and the traps that stay silent.

All goes through what a run uses: ``build_model``, ``Trainer.apply_schedules`` and ``Trainer.step``.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from openglm.config import ModelConfig
from openglm.data.loader import GlobalBatch, MicroBatch, Rows, share_of
from openglm.data.mixture import Sample
from openglm.errors import ConfigError
from openglm.infilling import NO_TARGET, Batch
from openglm.kernels.compiled import why_not
from openglm.models.glm130b import GLM130B
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.stage import gather
from openglm.training.optimizer import moments
from openglm.training.ranks import Ranks
from openglm.training.recipe import read_recipe
from openglm.training.run import build_model
from openglm.training.step import Trainer

CONFIG = ModelConfig(
    num_layers=4, hidden_size=64, num_attention_heads=4, inner_hidden_size=96, vocab_size=96, max_sequence_length=32
)
#: Where an axis is cut into eight.
DEEP = dataclasses.replace(CONFIG, num_layers=8, num_attention_heads=8)
ROWS, LENGTH = 8, 32
#: Makes the samples of a batch; where they come from is another test's.
SAMPLE = Sample(None, "[MASK]", "en", "made")  # pyright: ignore[reportArgumentType]


def batch() -> Batch:
    """Prefixes of different lengths, targets behind them, as blanks have them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, 96, (ROWS, LENGTH), generator=generator)
    targets = torch.full((ROWS, LENGTH), NO_TARGET)
    mask = torch.ones(ROWS, LENGTH, LENGTH, dtype=torch.bool).tril()
    for row in range(ROWS):
        prefix = 5 + 3 * row
        mask[row, :, :prefix] = True
        targets[row, prefix:] = torch.randint(11, 96, (LENGTH - prefix,), generator=generator)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    return Batch(tokens, positions, mask, torch.ones_like(tokens, dtype=torch.bool), targets)


def share(ranks: Ranks, parts: int) -> GlobalBatch:
    """A data rank's rows of the batch in so many micro-batches."""
    whole = batch()
    rows = share_of(0, ROWS, ranks.data_rank, ranks.layout.data)
    micro_batches = []
    for part in np.array_split(np.arange(rows.start, rows.stop), parts):
        own = Batch(*(getattr(whole, field.name)[part[0] : part[-1] + 1] for field in dataclasses.fields(Batch)))
        micro_batches.append(MicroBatch(own, [SAMPLE] * len(part), np.arange(len(part))[:, None].repeat(LENGTH, 1)))
    counts = [int((micro.batch.targets != NO_TARGET).sum()) for micro in micro_batches]
    return GlobalBatch(0, ROWS, micro_batches, tokens=len(rows) * LENGTH, targets=sum(counts))


def reference(
    input_factor: float = 1.0, output_factor: float = 1.0, config: ModelConfig = CONFIG
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of one plain process."""
    network = GLM130B(config).initialize(5)
    network.input_gradient_factor, network.output_gradient_factor = input_factor, output_factor
    whole = batch()
    logits = network(whole.tokens, whole.positions, whole.mask)
    loss = F.cross_entropy(logits.flatten(0, 1), whole.targets.flatten(), ignore_index=NO_TARGET)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in network.named_parameters()}


def trainer_on(layout: ParallelLayout, *changes: str, config: ModelConfig = CONFIG) -> Trainer:
    """This process of a run on a layout, before its first step."""
    shape = {name: value for name, value in config.to_dict().items() if isinstance(value, int)}
    table = ",".join(f"{name}={json.dumps(value)}" for name, value in shape.items())
    windows = (f"objectives.window={LENGTH}", f"objectives.long_window={LENGTH}")
    recipe = read_recipe(None, [f"model.changes={{{table}}}", *windows, "run.seed=5", "run.precision=float32", *changes])
    ranks = Ranks(layout, layout.mesh("cpu"), dist.get_rank())
    return Trainer(build_model(recipe, config, None, ranks), recipe, ranks)  # pyright: ignore[reportArgumentType]


def one_step(layout: ParallelLayout, changes: tuple[str, ...], micro: int, config: ModelConfig = CONFIG):
    """On each rank: loss (last stages), gradients of the stage, and the norm."""
    trainer = trainer_on(layout, *changes, config=config)
    trainer.apply_schedules(0)
    model, own = trainer.model, share(trainer.ranks, micro)
    count = int((batch().targets != NO_TARGET).sum())
    losses = model.forward_backward([part.batch for part in own.micro_batches], 1 / count)
    loss = torch.tensor(sum(float(part.sum()) for part in losses) / count, dtype=torch.float64)
    dist.all_reduce(loss)  # every tensor rank of a last stage has it
    norm = sum(model.norms().values()) ** 0.5
    gradients = {name: gradient.clone() for name, gradient in gather(model.network, lambda p: p.grad)}
    return float(loss) / layout.tensor, gradients, norm


LAYOUTS = [
    ParallelLayout(data=2),
    ParallelLayout(tensor=2),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=4),
    ParallelLayout(tensor=4),
    ParallelLayout(pipeline=4),
    ParallelLayout(data=2, tensor=2),
    ParallelLayout(data=2, pipeline=2),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(data=2, tensor=2, pipeline=2),
    ParallelLayout(data=8),
    ParallelLayout(tensor=8),
    ParallelLayout(pipeline=8),
    ParallelLayout(tensor=2, pipeline=4),
]


def compare(results, layout: ParallelLayout, expected, limit: float = 1e-6) -> None:
    loss, gradients = expected
    seen: set[str] = set()
    for found, parts, _ in results:
        assert found == pytest.approx(loss, abs=limit)
        for name, gradient in parts.items():
            assert gradient.shape == gradients[name].shape
            assert (gradient - gradients[name]).abs().max() <= limit, name
            seen.add(name)
    assert seen == gradients.keys()
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    assert all(result[2] == pytest.approx(float(norm), rel=1e-6) for result in results)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradients_equal_one_process(workers, layout: ParallelLayout) -> None:
    config = DEEP if 8 in (layout.tensor, layout.pipeline) else CONFIG
    micro = 1 if layout.data == 8 else max(2, layout.pipeline)
    results = workers.run(layout.world_size, one_step, layout, (), micro, config)
    compare(results, layout, reference(config=config))


def test_with_recomputation_resharding_and_shrunk_gradients(workers) -> None:
    shrunk = ("optimizer.input_gradient_factor=0.1", "optimizer.output_gradient_factor=0.3", "parallel.recompute=true")
    layout = ParallelLayout(data=2, tensor=2)
    results = workers.run(4, one_step, layout, (*shrunk, "parallel.reshard=true"), 2)
    compare(results, layout, reference(0.1, 0.3))
    layout = ParallelLayout(tensor=2, pipeline=2)
    results = workers.run(4, one_step, layout, shrunk, 4)
    compare(results, layout, reference(0.1, 0.3))


@pytest.mark.skipif(why_not("cpu") is not None, reason="torch.compile does not work here")
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (ParallelLayout(data=2), False),
        pytest.param(ParallelLayout(data=2, pipeline=2), True, marks=pytest.mark.slow),  # each process compiles for itself
    ],
)
def test_with_compiled_layers(workers, layout: ParallelLayout, recompute: bool) -> None:
    changes = ("run.compile=true", f"parallel.recompute={json.dumps(recompute)}")
    results = workers.run(layout.world_size, one_step, layout, changes, 2)
    compare(results, layout, reference())


def weights_of(layout: ParallelLayout) -> dict[str, torch.Tensor]:
    """Whole weights of this rank's stage, before the first step."""
    return dict(trainer_on(layout).model.whole_weights())


@pytest.mark.parametrize(
    "layout", [ParallelLayout(data=2), ParallelLayout(data=2, tensor=2), ParallelLayout(tensor=2, pipeline=2)], ids=str
)
def test_weights_do_not_depend_on_the_layout(workers, layout: ParallelLayout) -> None:
    expected = dict(GLM130B(CONFIG).initialize(5).named_parameters())
    seen = set()
    for parts in workers.run(layout.world_size, weights_of, layout):
        for name, found in parts.items():
            assert torch.equal(found, expected[name]), name
            half = len(found) // 2
            # The trap: each shard filled with the same numbers.
            assert "layernorm" in name or name.endswith("bias") or not torch.equal(found[:half], found[half:])
            seen.add(name)
    assert seen == expected.keys()


def clipped_step(layout: ParallelLayout, precision: str):
    """A step that clips to 0.1: what it reports, and the gradient that AdamW was given, which is in its first moment."""
    trainer = trainer_on(layout, f"run.precision={precision}", "optimizer.clip_norm=0.1")
    result = trainer.step(share(trainer.ranks, ROWS // layout.data), Rows(LENGTH))
    first = {
        name: moment / 0.1 for name, moment in gather(trainer.model.network, lambda p: moments(trainer.optimizer, p)["exp_avg"])
    }
    return result, first


@pytest.mark.parametrize(
    ("layout", "precision", "limit"),
    [
        (ParallelLayout(data=2, tensor=2, pipeline=2), "float32", 1e-6),
        (ParallelLayout(data=2), "bfloat16", 2e-3),
        (ParallelLayout(data=2, tensor=2), "bfloat16", 2e-3),
        (ParallelLayout(tensor=2, pipeline=2), "float16", 3e-4),
    ],
    ids=str,
)
def test_clipping_is_by_the_norm_over_all_axes(workers, layout: ParallelLayout, precision: str, limit: float) -> None:
    loss, gradients = reference()
    norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    seen: set[str] = set()
    for result, parts in workers.run(layout.world_size, clipped_step, layout, precision):
        assert result.loss == pytest.approx(loss, rel=1e-6 if precision == "float32" else 1e-3)
        assert result.gradient_norm == pytest.approx(norm, rel=1e-6 if precision == "float32" else 0.02)
        for name, gradient in parts.items():
            assert gradient.dtype == torch.float32
            assert (gradient - gradients[name] * 0.1 / norm).abs().max() <= limit * 0.1 / norm, name
            seen.add(name)
    assert seen == gradients.keys()


def too_few_micro_batches(layout: ParallelLayout) -> str:
    try:
        one_step(layout, (), 1)
    except ConfigError as error:
        return str(error)
    return ""


def test_impossible_layouts_are_one_sentence(workers) -> None:
    for layout, words in (
        (ParallelLayout(tensor=3), "`num_attention_heads` (4) cannot be divided over tensor 3"),
        (ParallelLayout(pipeline=5), "4 layers are too few for 5 pipeline stages"),
    ):
        with pytest.raises(ConfigError) as caught:
            layout.check(CONFIG)
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="needs 8 processes, but 4 were started"):
        ParallelLayout(2, 2, 2).check(CONFIG, world_size=4)
    with pytest.raises(ConfigError, match="`tensor` must be a whole number of at least 1"):
        ParallelLayout(tensor=0)
    assert all(
        "too few for 2 pipeline stages" in said for said in workers.run(2, too_few_micro_batches, ParallelLayout(pipeline=2))
    )


def test_stages_are_lighter_at_the_ends() -> None:
    sizes = [len(layers) for layers in ParallelLayout(pipeline=8).stage_layers(70)]
    assert sizes == [8, 9, 9, 9, 9, 9, 9, 8]  # SPEC 9.1.2
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            cut = ParallelLayout(pipeline=stages).stage_layers(layers)
            assert [n for part in cut for n in part] == list(range(layers))
            assert len(cut) == stages and min(map(len, cut)) >= 1
            middle = [len(part) for part in cut[1:-1]]
            assert not middle or max(len(cut[0]), len(cut[-1])) <= max(middle)


def masks_of(layout: ParallelLayout) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Place on the mesh, dropout masks of the branches, and of the attention weights, of one step."""
    trainer = trainer_on(layout, "optimizer.hidden_dropout=0.5", "optimizer.attention_dropout=0.5")
    mesh = trainer.ranks.mesh
    place = [mesh[axis].get_local_rank() for axis in ("pipeline", "data", "tensor")]
    hidden: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    real = F.dropout, F.scaled_dot_product_attention

    def dropout(x, p, training):
        out = real[0](torch.ones_like(x), p, training)
        hidden.append(out.detach().clone())
        return x * out

    def attend(query, key, value, attn_mask, dropout_p):
        attention.append(real[0](torch.ones(query.shape[:3]), dropout_p, True))
        return real[1](query, key, value, attn_mask=attn_mask)

    F.dropout, F.scaled_dot_product_attention = dropout, attend
    try:
        trainer.step(share(trainer.ranks, layout.pipeline), Rows(LENGTH))
    finally:
        F.dropout, F.scaled_dot_product_attention = real
    # Two layers of a stage, two micro-batches: before its first step a schedule infers shapes, and takes back what that drew.
    return place, hidden[-8:], attention[-4:]


def test_no_dropout_mask_is_repeated_on_two_shards(workers) -> None:
    found = workers.run(8, masks_of, ParallelLayout(data=2, tensor=2, pipeline=2))
    for a in range(8):
        for b in range(a):
            (one, hidden_a, attention_a), (other, hidden_b, attention_b) = found[a], found[b]
            # Branches lie whole on every tensor rank and are dropped alike there; all else differs, whenever it is drawn.
            if one[:2] == other[:2]:
                assert all(torch.equal(x, y) for x, y in zip(hidden_a, hidden_b, strict=True))
            else:
                assert not any(torch.equal(x, y) for x in hidden_a for y in hidden_b)
            assert not any(torch.equal(x, y) for x in attention_a for y in attention_b)
    for _, hidden, attention in found:
        assert len(hidden) == 8 and len(attention) == 4
        for masks in (hidden, attention):
            assert not any(torch.equal(masks[k], masks[j]) for k in range(len(masks)) for j in range(k))


def dropped_gradients(layout: ParallelLayout, recompute: bool):
    dropout = ("optimizer.hidden_dropout=0.1", "optimizer.attention_dropout=0.1")
    trainer = trainer_on(layout, *dropout, f"parallel.recompute={json.dumps(recompute)}")
    trainer.apply_schedules(3)
    trainer.model.forward_backward([batch()], 0.001)
    return dict(gather(trainer.model.network, lambda p: p.grad))


def test_recomputation_drops_the_same(workers) -> None:
    kept, again = (workers.run(2, dropped_gradients, ParallelLayout(tensor=2), recompute)[0] for recompute in (False, True))
    for name, gradient in kept.items():
        assert torch.allclose(gradient, again[name], atol=1e-7), name
