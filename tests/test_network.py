"""The network: its size, the original's recorded outputs, a float64 twin, initialisation, gradient shrink."""

from __future__ import annotations

import numpy as np
import pytest
import recorded
import torch
from twin import Twin

from openglm import infilling
from openglm.config import PRESETS, ModelConfig
from openglm.inference.cache import ColumnPool, Place, PoolView, Run
from openglm.models.glm130b import GLM130B, Attention, RotaryTable, rotate, shrink_gradient

SPECIAL = {"pad": 0, "eos": 2, "[MASK]": 3, "[gMASK]": 4, "[sMASK]": 5, "sop": 7, "eop": 8}
SMALL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    inner_hidden_size=48,
    vocab_size=90,
    max_sequence_length=64,
    special_tokens=SPECIAL,
)


def random_state(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that make every part of the network matter, norms and biases included; released names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GLM130B(config).named_parameters()}
    state = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=generator)
        scale = 1 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2
        state[f"transformer.{name}"] = draw * scale + (name.endswith("layernorm.weight"))
    return state


def double_network(config: ModelConfig, state: dict[str, torch.Tensor]) -> GLM130B:
    network = GLM130B(config).double()
    network.load_state_dict({name.removeprefix("transformer."): tensor.double() for name, tensor in state.items()})
    return network.eval().requires_grad_(False)


def test_parameters_of_every_preset():
    for name in PRESETS:
        config = ModelConfig.preset(name)
        with torch.device("meta"):
            network = GLM130B(config)
        assert sum(p.numel() for p in network.parameters()) == config.parameter_count, name
    assert ModelConfig.preset("130b").parameter_count == 128_697_794_560
    assert sum(p.numel() for p in network.layers["0"].parameters()) == 1_812_115_456


@pytest.fixture(scope="module")
def golden(shared):
    return recorded.Recorded(shared)


@pytest.mark.parametrize("table", recorded.TABLES)
@pytest.mark.parametrize("model", recorded.MODELS)
def test_recorded_logits_layers_and_cache(golden, model, table):
    rows = recorded.network_differences(golden, model, table) + recorded.cache_differences(golden, model, table)
    assert len(rows) >= 4
    for row in rows:
        assert row.holds, row


@pytest.mark.parametrize("model", recorded.MODELS)
def test_recorded_half_precision(golden, model):
    row = recorded.half_difference(golden, model)
    assert row.holds, row


LAYOUTS = {
    "blank": infilling.blank_sample(np.arange(10, 22), [4], [3], SPECIAL),
    "long blank": infilling.blank_sample(np.arange(10, 22), [4], [3], SPECIAL, kind="[gMASK]"),
    "two spans": infilling.blank_sample(np.arange(10, 30), [2, 9], [3, 2], SPECIAL, order=[1, 0]),
    "continuation": infilling.generation_sample(np.arange(10, 24), 6, SPECIAL),
    "unidirectional": infilling.unidirectional_prompt(list(range(10, 20)), SPECIAL).layout,
    "choices": infilling.choice_layout([11, 12, 3, 13], [[20, 21], [22], [23, 24, 25]], SPECIAL, "[MASK]")[0],
}


@pytest.mark.parametrize("table", ["float32", "float16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_network_equals_the_float64_twin(name, table):
    config = ModelConfig.from_dict({**SMALL.to_dict(), "rotary_dtype": table})
    state, layout = random_state(config, 1), LAYOUTS[name]
    expected = Twin(3, 4, state, table).logits(layout.tokens.tolist(), layout.positions.tolist(), ~layout.visible())
    batch = infilling.Batch.stack([layout], length=len(layout) + 3)
    found = double_network(config, state)(batch.tokens, batch.positions, batch.mask)[0, : len(layout)]
    assert found.dtype == torch.float64
    # Exact tables are float32 numbers.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_padding_left_or_right_changes_nothing():
    network = double_network(SMALL, random_state(SMALL, 2))
    layouts = list(LAYOUTS.values())
    for padding in ("left", "right"):
        batch = infilling.Batch.stack(layouts, padding=padding, multiple=8)
        found = network(batch.tokens, batch.positions, batch.mask)
        assert bool(found.isfinite().all())
        for row, layout in enumerate(layouts):
            alone = infilling.Batch.stack([layout])
            expected = network(alone.tokens, alone.positions, alone.mask)[0]
            torch.testing.assert_close(found[row][batch.valid[row]], expected, rtol=0, atol=1e-12)


def test_rows_are_those_of_the_whole():
    network = double_network(SMALL, random_state(SMALL, 3))
    batch = infilling.Batch.stack(list(LAYOUTS.values()))
    whole = network(batch.tokens, batch.positions, batch.mask).flatten(0, 1)
    rows = torch.tensor([0, 17, 40])
    torch.testing.assert_close(network(batch.tokens, batch.positions, batch.mask, rows=rows), whole[rows])


@pytest.mark.parametrize("dropout", [0.0, 1e-6])  # fused, and, with all but no dropout, written out
def test_softmax_is_in_float32_where_scores_are_beyond_float16(dropout):
    torch.manual_seed(0)
    attention = Attention(SMALL, 0)
    with torch.no_grad():
        attention.query_key_value.weight.view(4, 3, 8, 32)[:, :2] *= 1000  # queries and keys
    attention = attention.half()
    attention.dropout = dropout
    x = torch.randn(2, 24, 32).half().requires_grad_()
    rotary = RotaryTable(8, "float32").lookup(torch.arange(24).expand(2, 24), torch.float16, 24)
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    found = attention(x, rotary, mask, None)
    found.sum().backward()

    # The twin takes the same float16 queries, keys and values, and goes on in float64.
    qkv = attention.query_key_value(x).view(2, 24, 4, 24).transpose(1, 2)
    query, key, value = (part.detach() for part in qkv.chunk(3, dim=-1))
    scores = rotate(query, *rotary).double() @ rotate(key, *rotary).double().mT / 8**0.5
    assert scores.abs().max() > 2 * torch.finfo(torch.float16).max
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = attention.dense((weights @ value.double()).half().transpose(1, 2).reshape(2, 24, 32))
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)
    for tensor in (x, *attention.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_tables_grow_without_changing_and_half_tables_are_coarse():
    for dtype in ("float32", "float16"):
        table = RotaryTable(8, dtype)
        short = table.table(10, torch.device("cpu"), torch.float32).clone()
        assert short.shape[1] < 5000
        long = table.table(5000, torch.device("cpu"), torch.float32)
        assert torch.equal(long[:, : short.shape[1]], short)
    # Beyond an angle of 2048 half precision steps by two: neighbouring odd positions share an angle (SPEC 2.3).
    assert torch.equal(long[:, 4097, 0], long[:, 4096, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_cache_appends_to_what_was_there(dtype):
    """Two sequences share a prompt; a third one lies elsewhere, and is longer."""
    pool = ColumnPool(SMALL, 40, dtype=dtype)
    hole = pool.take(3)
    prompt, other = pool.take(4), pool.take(9)
    own = [pool.take(5), pool.take(5)]
    pool.give_back(hole)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 6, 8, generator=generator)
    places = [Place(prompt, own[0], 4, 0), Place(other, Run(other.start + 6, 3), 6, 0)]
    view = PoolView(pool, places, [4, 6])
    for layer in range(3):
        keys, _ = view.update(layer, first, -first)
        assert torch.equal(keys, first)  # a first pass sees what it brings, unrounded
    places = [Place(prompt, own[0], 4, 4), Place(prompt, own[1], 4, 4), Place(other, Run(other.start + 6, 3), 6, 6)]
    second = torch.randn(3, 4, 2, 8, generator=generator)
    view = PoolView(pool, places, [2, 1, 2])
    for layer in range(3):
        keys, values = view.update(layer, second, -second)
    for row, (source, old, new) in enumerate(((0, 4, 2), (0, 4, 1), (1, 6, 2))):
        wanted = torch.cat([first[source, :, :old], second[row, :, :new]], dim=1)
        found = keys[row, :, : old + new]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if dtype == torch.float32 else 0.02)
        torch.testing.assert_close(values[row, :, : old + new], -found, rtol=0, atol=1e-6)
    assert torch.isfinite(keys).all()


def test_columns_of_the_cache_are_taken_and_given_back():
    pool = ColumnPool(SMALL, 10, dtype=torch.float32)
    first, second, third = pool.take(3), pool.take(4), pool.take(3)
    with pytest.raises(MemoryError, match="no 1 columns"):
        pool.take(1)
    pool.give_back(first)
    pool.give_back(third)
    assert pool.free == 6 and pool.fits([3, 3]) and not pool.fits([4]) and pool.free == 6
    pool.give_back(second)
    assert pool.take(10) == Run(0, 10)


def test_gradient_shrink_scales_gradients_and_nothing_else():
    x = torch.randn(5, 7, requires_grad=True)
    (shrink_gradient(x, 0.1) ** 3).sum().backward()
    assert torch.equal(shrink_gradient(x, 0.1), x)
    other = x.detach().clone().requires_grad_()
    ((0.1 * other + 0.9 * other.detach()) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_gradient_shrink_has_a_factor_for_each_side_of_the_tied_matrix():
    state = random_state(SMALL, 4)
    batch = infilling.Batch.stack([LAYOUTS["two spans"]])
    targets = batch.targets
    assert targets is not None

    def gradients(input_factor: float, output_factor: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        network = double_network(SMALL, state).requires_grad_(True)
        network.input_gradient_factor, network.output_gradient_factor = input_factor, output_factor
        logits = network(batch.tokens, batch.positions, batch.mask)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
        return logits.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    plain_logits, plain = gradients(1.0, 1.0)
    _, only_output = gradients(0.0, 1.0)
    _, only_input = gradients(1.0, 0.0)
    name = "word_embeddings.weight"
    torch.testing.assert_close(only_output[name] + only_input[name], plain[name])
    assert float(only_input[name].abs().max()) > 0
    logits, shrunk = gradients(0.1, 0.4)
    assert torch.equal(logits, plain_logits)
    torch.testing.assert_close(shrunk[name], 0.1 * only_input[name] + 0.4 * only_output[name])
    for other in plain:
        if other != name:
            torch.testing.assert_close(shrunk[other], plain[other], msg=other)


def test_initialisation_statistics():
    config = ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4, inner_hidden_size=256, vocab_size=2000)
    network = GLM130B(config).initialize(7).requires_grad_(False)
    h, i, d, gain = 128, 256, 32, 8**-0.5
    layer = network.layers["2"]
    qkv = layer.attention.query_key_value.weight.view(4, 3, d, h)
    for found, expected in (
        (network.word_embeddings.weight, (1 / (3 * h)) ** 0.5),
        (qkv[:, 0], (1 / (3 * h)) ** 0.5),
        (qkv[:, 1], (1 / (3 * h)) ** 0.5),
        (qkv[:, 2], gain * (2 / (h + h)) ** 0.5),
        (layer.attention.dense.weight, gain * (2 / (h + h)) ** 0.5),
        (layer.mlp.dense_h_to_4h.weight, gain * (2 / (h + i)) ** 0.5),
        (layer.mlp.dense_4h_to_h.weight, gain * (2 / (h + i)) ** 0.5),
    ):
        assert float(found.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(found.mean())) < 0.05 * expected
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert bool((parameter == 1).all()), name


def test_initialisation_depends_on_seed_and_name_alone():
    network = GLM130B(SMALL).initialize(1)
    torch.manual_seed(0)
    torch.randn(100)
    again = GLM130B(SMALL).initialize(1)
    part = GLM130B(SMALL)
    del part.layers["0"]  # another part of the network, as pipeline stages have it
    part.initialize(1)
    state = network.state_dict()
    for name, tensor in [*again.state_dict().items(), *part.state_dict().items()]:
        assert torch.equal(tensor, state[name]), name
    assert not torch.equal(GLM130B(SMALL).initialize(2).word_embeddings.weight, network.word_embeddings.weight)
    up = network.layers["0"].mlp.dense_h_to_4h.weight
    assert not torch.equal(up[:48], up[48:])
    assert not torch.equal(up, network.layers["1"].mlp.dense_h_to_4h.weight)
