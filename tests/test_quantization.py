"""The arithmetic of quantized weights: the original's recordings, and rules that hold for any weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openglm.config import QUANTIZATION_GROUPS as GROUPS
from openglm.config import QUANTIZED_MATRICES, ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.errors import ConfigError
from openglm.models.glm130b import GLM130B
from openglm.quantization.functional import Quantized, linear, pack, quantize_matrix, unpack
from openglm.quantization.layers import QuantizedLinear, quantize


@pytest.fixture(scope="module")
def recorded(shared) -> tuple[dict, dict[str, torch.Tensor]]:
    folder = shared / "golden" / "quantization"
    return json.loads((folder / "cases.json").read_text()), load_file(folder / "cases.safetensors")


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    """Largest distance of two float16 tensors in units of the last place."""

    def ordered(x: torch.Tensor) -> np.ndarray:
        bits = x.numpy().view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return int(np.abs(ordered(one) - ordered(other)).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_recorded_matrices_bit_for_bit(recorded, bits: int) -> None:
    cases, tensors = recorded
    assert len(cases["cases"]) == 14
    for name in cases["cases"]:
        weight, x = tensors[f"{name}/weight"], tensors[f"{name}/input"]

        def told(key: str, name: str = name) -> torch.Tensor:
            return tensors[f"{name}/int{bits}/{key}"]

        scheme = Scheme(bits)
        found = quantize_matrix(weight, scheme)
        assert torch.equal(found.scales.squeeze(1), told("scale")), name
        codes = told("codes")
        within = codes.int().abs() <= scheme.largest  # beyond it the original's codes overflow, and ours are clamped
        assert torch.equal(found.codes[within], codes[within]), name
        assert torch.equal(found.codes[~within].sign(), weight[~within].sign().to(torch.int8)), name
        assert (found.codes[~within].abs() == scheme.largest).all(), name
        assert torch.equal(found.dequantize()[within], told("dequantized")[within]), name
        if bits == 4:
            rows = within.all(1)
            packed = pack(found.codes)
            assert torch.equal(packed[rows], told("packed")[rows]), name
            assert torch.equal(unpack(packed), found.codes), name
        # The recorded codes through our product: what their overflow made of them is in the recording.
        kept = Quantized(told("codes_after_unpacking") if bits == 4 else codes, told("scale").unsqueeze(1))
        assert torch.equal(kept.dequantize(), told("dequantized")), name
        product = torch.nn.functional.linear(x.float(), kept.dequantize().float())
        exact = told("product_float32")
        assert (product - exact).abs().max() <= 1e-6 * exact.abs().max() + 1e-30, name
        assert ulps(linear(x, kept), told("product_half")) <= 1, name
        with_bias = linear(x, kept, tensors[f"{name}/bias"])
        assert ulps(told("product_half") + tensors[f"{name}/bias"], told("output_half")) == 0
        assert (with_bias - told("output_half")).abs().max() <= 2e-3 * told("output_half").abs().max() + 1e-6, name


def test_all_pairs_of_nibbles(recorded) -> None:
    nibbles = recorded[0]["nibbles"]
    codes = torch.tensor([nibbles["even_column"], nibbles["odd_column"]], dtype=torch.int8).t().contiguous()
    packed = torch.tensor(nibbles["packed_int8"], dtype=torch.int8).unsqueeze(1)
    assert torch.equal(pack(codes), packed) and torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_ranks_of_a_split_matrix_are_groups_of_columns(shared, bits: int, ranks: int) -> None:
    tensors = load_file(shared / "golden" / "quantization" / "tensor_parallel.safetensors")
    weight = tensors["column_split/weight"]
    parts = [
        {key: tensors[f"column_split/tp{ranks}/rank{r}/int{bits}/{key}"] for key in ("scale", "stored", "dequantized")}
        for r in range(ranks)
    ]
    codes = torch.cat([part["stored"] if bits == 8 else unpack(part["stored"]) for part in parts], dim=1)
    joined = Quantized(codes, torch.stack([part["scale"] for part in parts], dim=1))
    assert torch.equal(joined.dequantize(), torch.cat([part["dequantized"] for part in parts], dim=1))
    for part, own in zip(parts, weight.chunk(ranks, dim=1), strict=True):
        found = quantize_matrix(own.contiguous(), Scheme(bits))
        assert torch.equal(found.scales.squeeze(1), part["scale"])
        assert torch.equal(pack(found.codes) if bits == 4 else found.codes, part["stored"])


def twin(weight: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """Symmetric quantization in float64, from the definition: what no code of a fitting scale can be far from."""
    columns = group or weight.shape[1]
    parts = weight.reshape(len(weight), -1, columns)
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(parts).max(-1, keepdims=True) / largest
    return (np.clip(np.rint(parts / np.where(scale == 0, 1, scale)), -largest, largest) * scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_any_matrix_is_as_near_as_the_definition(bits: int, group: int | None) -> None:
    generator = torch.Generator().manual_seed(bits + (group or 0))
    weight = (torch.randn(24, 256, generator=generator) * torch.logspace(-3, 1, 24).unsqueeze(1)).half()
    weight[3], weight[7, 128:] = 0, 0
    found = quantize_matrix(weight, Scheme(bits, group))
    assert found.scales.shape == (24, 256 // (group or 256)) and found.codes.abs().max() == 2 ** (bits - 1) - 1
    made, exact = found.dequantize().double().numpy(), weight.double().numpy()
    assert (made[3] == 0).all() and (group is None or (made[7, 128:] == 0).all())
    error = np.linalg.norm(made - exact, axis=1)
    definition = np.linalg.norm(twin(exact, bits, group) - exact, axis=1)
    assert (error <= 1.05 * definition + 1e-9).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 64])
def test_clipping_and_zero_points_never_lose(bits: int, group: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 256, generator=generator)
    weight[:, 0] = 9  # an outlier that widens the range
    one_sided = weight.abs() + 1

    def error(matrix: torch.Tensor, **options) -> torch.Tensor:
        made = quantize_matrix(matrix, Scheme(bits, group, **options)).dequantize()
        return (made.float() - matrix.half().float()).square().sum(1)

    assert (error(weight, clip=True) <= error(weight)).all()
    assert (error(weight, clip=True, zero_point=True) <= error(weight, zero_point=True)).all()
    if bits == 4:
        assert error(weight, clip=True).sum() < 0.95 * error(weight).sum()
    # Weights on one side of 0 use only half of the symmetric codes.
    assert error(one_sided, zero_point=True).sum() < 0.5 * error(one_sided).sum()


def test_grouped_products_equal_dequantized_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(40, 128, generator=generator), torch.randn(3, 2, 128, generator=generator)
    for options in ({}, {"zero_point": True}, {"clip": True}):
        found = quantize_matrix(weight, Scheme(4, 32, **options))
        exact = x.double() @ found.dequantize().double().t()
        assert (linear(x, found) - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert linear(x.half(), found).dtype == torch.float16
        assert linear(x.bfloat16(), found, torch.zeros(40, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scheme(3), "8 or 4 bits, not 3"),
        (lambda: Scheme(8, 100), "groups of 32, 64, 128 columns, not of 100"),
        (lambda: quantize_matrix(torch.zeros(2, 96), Scheme(4, 128)), "rows of 96 weights .* groups of 128"),
        (lambda: quantize_matrix(torch.full((2, 32), 1e6), Scheme(8)), "too large for float16"),
        (lambda: quantize_matrix(torch.full((2, 32), torch.nan), Scheme(8)), "not finite"),
        (lambda: pack(torch.zeros(2, 3, dtype=torch.int8)), "whole bytes"),
    ],
)
def test_bad_input_is_one_sentence(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, inner_hidden_size=96, vocab_size=80)


def logits(network: GLM130B) -> torch.Tensor:
    tokens = torch.randint(0, 80, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(tokens, torch.arange(15).expand(2, 15))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 32)])
def test_a_quantized_network_is_the_network_of_the_dequantized_weights(bits: int, group: int | None) -> None:
    network, twin_ = GLM130B(CONFIG).initialize(2), GLM130B(CONFIG).initialize(2)
    errors = quantize(network, Scheme(bits, group))
    assert [error.name for error in errors] == [f"layers.{n}.{name}" for n in range(2) for name in QUANTIZED_MATRICES]
    plain = 0
    for error in errors:
        module, other = network.get_submodule(error.name), twin_.get_submodule(error.name)
        assert isinstance(module, QuantizedLinear)
        made, exact = module.weight.dequantize().float(), other.weight.detach()
        assert error.relative_error == pytest.approx(float((made - exact).norm() / exact.norm()), rel=1e-3)
        assert 0 < error.relative_error < (0.02 if bits == 8 else 0.2)
        other.weight.data = made
        plain += 2 * other.weight.numel()
    assert (logits(network) - logits(twin_)).abs().max() <= 1e-5 * logits(twin_).abs().max()
    # 8 or 4 bits a weight, and 16 for each scale.
    size = sum(error.bytes for error in errors)
    scales = sum(module.scales.numel() for module in network.modules() if isinstance(module, QuantizedLinear))
    assert size == plain * bits // 16 + 2 * scales
    # Saved and loaded as any network is.
    copy = GLM130B(CONFIG).initialize(3)
    quantize(copy, Scheme(bits, group))
    copy.load_state_dict(network.state_dict())
    assert torch.equal(logits(copy), logits(network))


def test_a_network_is_quantized_once_and_wholly_or_not_at_all() -> None:
    network = GLM130B(CONFIG).initialize(2)
    before = logits(network)
    with pytest.raises(ConfigError, match=r"rows of 64 weights .* groups of 128"):
        quantize(network, Scheme(4, 128))
    assert torch.equal(logits(network), before)
    quantize(network, Scheme(8))
    with pytest.raises(ConfigError, match=r"`layers\.0\.attention\.query_key_value` is quantized already"):
        quantize(network, Scheme(8))
