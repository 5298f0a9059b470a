"""The compiled CPU kernels beside their twins: integer sums exactly, products and whole networks within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import openglm
from openglm.checkpoints import open_model
from openglm.checkpoints.loading import convert_source
from openglm.config import ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.errors import InputError
from openglm.inference.cache import StaticCache
from openglm.inference.engine import Engine
from openglm.kernels.cpu import build as builder
from openglm.kernels.cpu.decode import DecodeStep
from openglm.kernels.cpu.library import VARIANT, library, variants, why_not
from openglm.kernels.cpu.panels import PanelMatrix, integer_sums, product, quantize_activations
from openglm.models.glm130b import GLM130B
from openglm.quantization.functional import Quantized, quantize_matrix
from openglm.quantization.layers import quantize, use_panels

needs_kernels = pytest.mark.skipif(not variants(), reason="the CPU kernels are not compiled")
SCHEMES = [Scheme(bits, group) for bits in (8, 4) for group in (None, 32, 64, 128)]
CONFIG = ModelConfig(num_layers=3, hidden_size=128, num_attention_heads=2, inner_hidden_size=160, vocab_size=75)


def packed(found: Quantized, scheme: Scheme, bias: Tensor | None = None, halves: int = 1) -> PanelMatrix:
    rows, columns = found.codes.shape
    matrix = PanelMatrix(rows, columns, scheme.bits, scheme.group, bias, halves)
    for first in range(0, rows, rows // halves):
        part = slice(first, first + rows // halves)
        matrix.pack(first, found.codes[part], found.scales[part])
    return matrix


def exact_weights(found: Quantized) -> Tensor:
    """float64, not rounded to float16 as the original's are."""
    return (found.codes.double().unflatten(1, (found.scales.shape[1], -1)) * found.scales.double().unsqueeze(-1)).flatten(1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_kernels
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_the_twins(monkeypatch, variant: str, scheme: Scheme) -> None:
    monkeypatch.setenv(VARIANT, variant)
    generator = torch.Generator().manual_seed(scheme.bits + (scheme.group or 0))
    shapes = [(96, 384, 1), (100, 256, 2), (33, 128, 1), *([(70, 100, 1)] if scheme.group is None else [])]
    for rows, columns, halves in shapes:  # whole panels, panels that end in each half, columns that fill no block
        found = quantize_matrix(torch.randn(rows, columns, generator=generator), scheme)
        bias = torch.randn(rows, generator=generator)
        matrix = packed(found, scheme, bias, halves)
        x = torch.randn(6, columns, generator=generator)
        x[0, 3], x[1], x[2, :32] = 60.0, 0.0, -1e-20  # an outlier, zeros, and next to nothing
        chunk, padding = matrix.structure.chunk, (0, matrix.structure.columns - columns)
        codes, wide = torch.nn.functional.pad(found.codes, padding), torch.nn.functional.pad(x, padding)
        for row in range(3):
            values, scales = quantize_activations(wide[row], chunk)
            assert values.abs().max() <= 32512
            sums, own = matrix.integer_sums(x[row])
            assert torch.equal(sums.long(), integer_sums(codes, values, chunk)) and torch.equal(own, scales)
        wanted = product(codes, found.scales, wide, chunk) + bias
        assert relative(matrix.linear(x), wanted) < 2e-7
        assert relative(wanted, x.double() @ exact_weights(found).T + bias) < 1e-4
        assert torch.equal(matrix.linear(x[1]), bias)
        assert matrix.linear(x.half()).dtype == torch.float16
        x[4, 7] = float("nan")
        x[5, 7] = float("inf")
        broken = matrix.linear(x)
        assert broken[4:].isnan().all() and broken[:4].isfinite().all()


@needs_kernels
def test_rows_come_back_from_panels() -> None:
    for scheme in SCHEMES:
        found = quantize_matrix(torch.randn(75, 128, generator=torch.Generator().manual_seed(1)), scheme)
        rows = torch.tensor([0, 74, 33, 33, 5])
        assert torch.equal(packed(found, scheme).unpack_rows(rows).double(), exact_weights(found)[rows])
    with pytest.raises(ValueError, match="rows 0 to 40 are no whole panels"):
        PanelMatrix(75, 128, 8, None).pack(0, torch.zeros(40, 128, dtype=torch.int8), torch.zeros(40, 1, dtype=torch.float16))


def network_of(scheme: Scheme) -> tuple[GLM130B, GLM130B]:
    """A quantized network for the kernels, and a plain one in float64 with the very same weights."""
    network = GLM130B(CONFIG).initialize(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    plain = GLM130B(CONFIG).double()
    plain.load_state_dict(network.state_dict())
    quantize(network, scheme)
    with torch.no_grad():
        for name, module in plain.named_modules():
            weight = getattr(network.get_submodule(name), "weight", None) if name else None
            if isinstance(weight, Quantized):
                module.weight.copy_(exact_weights(weight))
    return network.requires_grad_(False), plain.requires_grad_(False)


@needs_kernels
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4, 32, head_bits=8), Scheme(4), Scheme(8, head_bits=4)], ids=str)
def test_a_step_is_the_networks_forward(monkeypatch, variant: str, scheme: Scheme) -> None:
    monkeypatch.setenv(VARIANT, variant)
    network, plain = network_of(scheme)
    assert use_panels(network) == ""
    step = DecodeStep(network)
    assert DecodeStep.serves(network) and step.has_head == (scheme.head_bits is not None)
    generator = torch.Generator().manual_seed(0)
    for rows, threads, dtype in ((1, 1, torch.float32), (5, 2, torch.float32), (3, 3, torch.float16)):
        tokens = torch.randint(0, CONFIG.vocab_size, (rows, 12), generator=generator)
        positions = torch.arange(12) + torch.arange(rows)[:, None]
        mask = torch.ones(rows, 12, 12, dtype=torch.bool).tril()
        mask[1:2, 3:, 1:3] = False  # one row sees less
        wanted = plain(tokens, positions, mask)
        cache = StaticCache(CONFIG, rows + 1, 20, dtype=dtype)  # it may hold more rows and columns
        cache.rows = rows
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for t in range(12):
                if t < 5 and dtype == torch.float32:  # a prefill by the network, through the same matrices
                    if t == 0:
                        network.hidden_states(tokens[:, :5], positions[:, :5], mask[:, :5, :5], cache=cache)
                        cache.advance(5)
                    continue
                rotary = network.rotary.table(40, torch.device("cpu"), torch.float32)[:, positions[:, t]]
                visible = None if rows == 1 else mask[:, t]
                found = step(network.embed(tokens[:, t]), rotary, cache.keys, cache.values, t, visible)
                if not step.has_head:
                    found = network.vocabulary_product(found, network.word_embeddings.weight)
                assert relative(found, wanted[:, t]) < (1e-4 if dtype == torch.float32 else 2e-3)
                cache.advance(1)
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "int8"
    convert_source(
        open_model(Path(openglm.__file__).parent / "assets" / "nano"), folder, dtype=None, scheme=Scheme(8, 64, head_bits=8)
    )
    return folder


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.8, "seed": 3}], ids=str)
def test_the_engine_writes_what_its_twin_writes(small: Path, monkeypatch, options: dict) -> None:
    texts = ["The old man [MASK] the river.", "他在北京[MASK]。", "[gMASK]", "One, two, [MASK], four."]
    fast = openglm.load(small)
    assert fast.engine.step_kernel is not None and not fast.notes
    monkeypatch.setenv(VARIANT, "none")
    slow = openglm.load(small)
    assert slow.engine.step_kernel is None and "switched off" in slow.notes[-1]
    for one, other in zip(*(glm.fill_batch(texts[:2], max_tokens=8, **options) for glm in (fast, slow)), strict=True):
        assert one.text == other.text
    long = "Once upon a time there was a king. " * 4
    one, other = (glm.score(long + "[MASK]", ["He was old.", "他老了。"]) for glm in (fast, slow))
    for mine, twin in zip(one.choices, other.choices, strict=True):
        assert mine.log_probability == pytest.approx(twin.log_probability, abs=0.02)


def test_a_variant_that_does_not_run_is_refused(monkeypatch) -> None:
    if not variants():
        pytest.skip("the CPU kernels are not compiled")
    monkeypatch.setenv(VARIANT, "avx1024")
    with pytest.raises(InputError, match=r"asks for `avx1024`, but this machine runs .*portable"):
        library()


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path) -> None:
    with pytest.raises(builder.BuildError, match="there is no C compiler"):
        builder.build(tmp_path / "x.so", compiler="no-such-compiler")
    with pytest.raises(builder.BuildError, match="`false` failed"):
        builder.build(tmp_path / "x.so", compiler="false")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("openglm.kernels.cpu.library.LIBRARY", "not-there.so")
    network, _ = network_of(Scheme(8))
    engine = Engine(network)
    assert engine.notes == [why_not()] and "python -m openglm.kernels.cpu.build" in engine.notes[0]
    assert engine.step_kernel is None


@needs_kernels
def test_networks_with_zero_points_stay_with_the_twin() -> None:
    network, _ = network_of(Scheme(8, 32, zero_point=True, head_bits=8))
    assert "zero points" in use_panels(network)
    assert not DecodeStep.serves(network)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_computes_too() -> None:
    script = """
import os, torch
from openglm.kernels.cpu.panels import PanelMatrix
torch.set_num_threads(3)
matrix = PanelMatrix(256, 128, 8, None)
matrix.pack(0, torch.ones(256, 128, dtype=torch.int8), torch.ones(256, 1, dtype=torch.float16))
assert abs(float(matrix.linear(torch.ones(128))[200]) - 128) < 1e-2
child = os.fork()
if child == 0:
    os._exit(0 if abs(float(matrix.linear(torch.ones(128))[200]) - 128) < 1e-2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)
