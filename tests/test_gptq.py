"""GPTQ: the arithmetic against the paper's formulas, the walk through a network, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TEXT, refuse, run
from torch import Tensor

from openglm import load
from openglm.checkpoints import open_checkpoint, open_model, save_checkpoint
from openglm.checkpoints.loading import convert_source, load_network
from openglm.config import QUANTIZED_MATRICES, ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.data.calibration import LONGEST, SHORTEST, calibration_samples
from openglm.errors import ConfigError
from openglm.models.glm130b import GLM130B
from openglm.quantization import gptq
from openglm.quantization.calibration import CalibrationSample
from openglm.quantization.functional import quantize_matrix
from openglm.quantization.gptq import gptq_matrix, inverse_factor, output_errors

SCHEMES = [
    Scheme(4),
    Scheme(4, 32),
    Scheme(4, 128),
    Scheme(8),
    Scheme(4, clip=True),
    Scheme(4, 32, zero_point=True),
    Scheme(4, ranks=2),
]


def problem(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight ``[n, m]`` and inputs ``[8 m, m]`` whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(m, m, generator=generator) * torch.logspace(0, -2, m)
    return torch.randn(n, m, generator=generator) * 0.05, torch.randn(8 * m, m, generator=generator) @ mixing.t()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_with_correlated_inputs_change_less(scheme: Scheme) -> None:
    weight, x = problem(40, 256)
    made = gptq_matrix(weight, x.t() @ x, scheme)
    nearest = quantize_matrix(weight, scheme)

    def error(matrix: Tensor) -> float:
        exact = x.double() @ weight.double().t()
        return float((x.double() @ matrix.double().t() - exact).norm() / exact.norm())

    assert error(made.dequantize()) < 0.7 * error(nearest.dequantize())
    low = -scheme.largest - scheme.zero_point
    assert made.codes.dtype == torch.int8 and low <= made.codes.min() and made.codes.max() <= scheme.largest
    assert made.scales.dtype == torch.float16 and made.scales.shape == nearest.scales.shape
    assert (made.zeros is None) == (nearest.zeros is None)
    told = output_errors(weight, made, x.t() @ x, scheme)
    assert told == pytest.approx((error(made.dequantize()), error(nearest.dequantize())), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_know_nothing_of_each_other_leave_rounding_to_nearest(scheme: Scheme) -> None:
    weight, _ = problem(24, 256)
    weight[3], weight[5, 128:] = 0, 0
    nearest = quantize_matrix(weight, scheme)
    for hessian in (torch.eye(256), torch.diag(torch.logspace(-6, 6, 256)), torch.zeros(256, 256)):
        made = gptq_matrix(weight, hessian, scheme)
        assert torch.equal(made.codes, nearest.codes) and torch.equal(made.scales, nearest.scales)
        assert (made.zeros is None and nearest.zeros is None) or torch.equal(made.zeros, nearest.zeros)


def twin(weight: np.ndarray, hessian: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """Codes by Optimal Brain Quantization in the order of the columns, float64, a row at a time (paper, equations 2 and 3)."""
    largest, width = 2 ** (bits - 1) - 1, weight.shape[1]
    codes = np.zeros(weight.shape, dtype=np.int64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(width)
    for row, exact in enumerate(weight):
        rest, inverse, scale = exact.astype(np.float64), np.linalg.inv(damped), np.float16(0)
        for q in range(width):
            if q % (group or width) == 0:
                scale = np.float16(np.abs(np.float16(rest[q : q + (group or width)])).max() / np.float32(largest))
            codes[row, q] = np.clip(np.rint(np.float16(rest[q]) / scale), -largest, largest)
            made = np.float64(np.float16(codes[row, q]) * scale)
            rest = rest - (rest[q] - made) / inverse[q, q] * inverse[:, q]
            inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 32), (8, None)])
def test_codes_are_those_of_the_papers_formulas(monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None) -> None:
    monkeypatch.setattr(gptq, "BLOCK", 24)  # blocks that do not divide the columns
    monkeypatch.setattr(gptq, "SLICE", 5 * 64)  # and slices that do not divide the rows
    weight, x = problem(12, 64, seed=1)
    weight = weight.half().float()
    made = gptq_matrix(weight, x.t() @ x, Scheme(bits, group))
    x64 = x.double().numpy()
    expected = twin(weight.numpy(), x64.T @ x64, bits, group)
    assert np.array_equal(made.codes.numpy(), expected)
    assert not torch.equal(made.codes, quantize_matrix(weight, Scheme(bits, group)).codes)


def test_columns_without_inputs_are_rounded_and_move_nothing() -> None:
    weight, x = problem(16, 96)
    dead = torch.tensor([0, 7, 31, 95])
    x[:, dead] = 0
    weight[:, dead] *= 0.1  # so that they decide no scale
    made, nearest = gptq_matrix(weight, x.t() @ x, Scheme(4)), quantize_matrix(weight, Scheme(4))
    assert torch.equal(made.codes[:, dead], nearest.codes[:, dead])
    alive = torch.ones(96, dtype=torch.bool)
    alive[dead] = False
    other = weight.clone()
    other[:, dead] *= -2
    assert torch.equal(gptq_matrix(other, x.t() @ x, Scheme(4)).codes[:, alive], made.codes[:, alive])
    ours, rounded = output_errors(weight, made, x.t() @ x, Scheme(4))
    assert ours < rounded


def test_a_hessian_that_float32_cannot_factorize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "DAMPING", 1e-6)
    x = torch.randint(-3, 4, (4, 300), generator=torch.Generator().manual_seed(0)).float()
    x[0] = 1  # no column is dead
    damped = (x.t() @ x).double()  # of rank 4
    damped.diagonal().add_(1e-6 * damped.diagonal().mean())
    assert torch.linalg.cholesky_ex(damped.float().flip(0, 1))[1] > 0
    factor = inverse_factor(x.t() @ x).double()
    assert (factor.tril(-1) == 0).all() and (factor.diagonal() > 0).all()
    inverse = torch.linalg.inv(damped)
    assert (factor.t() @ factor - inverse).norm() < 1e-5 * inverse.norm()


def test_what_is_no_hessian_is_refused() -> None:
    for wrong in (torch.full((64, 64), torch.nan), -torch.eye(64)):
        with pytest.raises(ConfigError, match="the Hessian"):
            gptq_matrix(torch.zeros(4, 64), wrong, Scheme(4))
    with pytest.raises(ConfigError, match="groups of 128"):
        gptq_matrix(torch.zeros(4, 64), torch.eye(64), Scheme(4, 128))


# ---------------------------------------------------------------------------------------------------------------------
# A network


CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, inner_hidden_size=96, vocab_size=80)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    network = GLM130B(CONFIG).initialize(2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    save_checkpoint(folder, CONFIG, network.state_dict(), dtype="float16")
    return folder


def samples(count: int) -> list[CalibrationSample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for k in range(count):
        length = 20 + k
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:, : length // 2] = True
        tokens = torch.randint(11, 80, (length,), generator=generator)
        found.append(CalibrationSample(tokens, torch.arange(length), mask))
    return found


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(4, 32, head_bits=8), Scheme(8, 32, zero_point=True)], ids=str)
def test_each_matrix_is_quantized_on_what_those_before_it_compute(plain: Path, tmp_path: Path, scheme: Scheme) -> None:
    used = samples(12)
    errors = convert_source(open_model(plain), tmp_path / "small", scheme=scheme, calibration=used)
    source = open_checkpoint(tmp_path / "small")
    source.verify()
    assert source.config == dataclasses.replace(CONFIG, quantization=scheme)
    network, exact = load_network(source, "float32"), load_network(open_model(plain), "float32")
    names = [f"layers.{number}.{matrix}" for number in range(2) for matrix in QUANTIZED_MATRICES]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0][0]))
    with torch.no_grad():
        for sample in used:
            network(sample.tokens[None], sample.positions[None], sample.mask[None])
    told = {error.name: error for error in errors}
    assert list(told)[-8:] == names and (("word_embeddings" in told) == (scheme.head_bits is not None))
    for name in names:
        x, weight, made = torch.cat(inputs[name]), exact.get_submodule(name).weight.detach(), network.get_submodule(name).weight
        products = x @ weight.t()
        error = float((x @ made.dequantize().float().t() - products).norm() / products.norm())
        assert told[name].output_error == pytest.approx(error, rel=1e-3)
        assert told[name].output_error < 0.95 * told[name].nearest_output_error
        assert told[name].bytes == sum(buffer.nbytes for buffer in network.get_submodule(name).buffers())
        assert told[name].relative_error == pytest.approx(float((made.dequantize() - weight).norm() / weight.norm()), rel=1e-3)


def test_logits_change_less_than_by_rounding(plain: Path, tmp_path: Path) -> None:
    convert_source(open_model(plain), tmp_path / "nearest", scheme=Scheme(4))
    convert_source(open_model(plain), tmp_path / "gptq", scheme=Scheme(4), calibration=samples(40)[1:])
    (sample,) = samples(1)
    glms = [
        load(folder) for folder in (plain, tmp_path / "nearest", tmp_path / "gptq")
    ]  # in the CPU kernels, where there are any
    prompt = [*sample.tokens.tolist(), CONFIG.special_tokens["[MASK]"], CONFIG.special_tokens["eos"]]
    assert all(glm.fill_ids(prompt, search="greedy", max_length=30) for glm in glms)
    with torch.inference_mode():
        logits = [
            load_network(open_model(folder), "float32")(sample.tokens[None], sample.positions[None], sample.mask[None])
            for folder in (plain, tmp_path / "nearest", tmp_path / "gptq")
        ]
    assert (logits[2] - logits[0]).norm() < 0.9 * (logits[1] - logits[0]).norm()


# ---------------------------------------------------------------------------------------------------------------------
# Samples and the command


def test_samples_are_windows_as_glm_sees_them(tiny: Path, tiny_tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 5, encoding="utf-8")
    config = open_model(tiny).config
    special = config.special_tokens
    found = calibration_samples([text], tiny_tokenizer, config, count=6)
    assert len(found) == 6
    for k, sample in enumerate(found):
        length = len(sample.tokens)
        assert SHORTEST <= length <= min(LONGEST, config.max_sequence_length) and sample.mask.shape == (length, length)
        assert special["[MASK]" if k % 2 else "[gMASK]"] in sample.tokens and special["sop"] in sample.tokens
        assert sample.mask.diagonal().all()
    again = calibration_samples([text], tiny_tokenizer, config, count=6)
    other = calibration_samples([text], tiny_tokenizer, config, count=6, seed=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))
    assert not all(
        len(a.tokens) == len(b.tokens) and torch.equal(a.tokens, b.tokens) for a, b in zip(found, other, strict=True)
    )
    every = calibration_samples([text], tiny_tokenizer, config, count=1000)
    assert 6 < len(every) < 1000
    only = calibration_samples([text], tiny_tokenizer, dataclasses.replace(config, learned_masks=("[gMASK]",)), count=6)
    assert all(special["[gMASK]"] in sample.tokens for sample in only)


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 5, encoding="utf-8")
    target = tmp_path / "small"
    said = run("quantize", tiny, target, "--bits", "4", "--group", "32", "--gptq", text, "--text", text).stderr
    assert "rounded to nearest > GPTQ" in said and "bits per byte" in said
    found = json.loads(run("info", target, "--json").stdout)
    assert found["config"]["quantization"] == {"bits": 4, "group": 32, "zero_point": False, "clip": False}
    assert run("fill", "-m", target, "The sky is [MASK].", "--max-tokens", "3").stdout
    options = ("--bits", "4", "--gptq", text, "--gptq", text, "--samples", "3", "--seed", "1", "--json")
    values = json.loads(run("quantize", tiny, tmp_path / "row", *options).stdout)
    assert values["calibration"]["samples"] == 3 and values["calibration"]["tokens"] > 3 * SHORTEST
    assert len(values["output_errors"]) == 8
    assert all(0 < pair["gptq"] < pair["nearest"] for pair in values["output_errors"].values())


def test_what_the_command_refuses(tiny: Path, tmp_path: Path) -> None:
    text, empty, target = tmp_path / "text.txt", tmp_path / "empty.txt", tmp_path / "small"
    text.write_text(TEXT, encoding="utf-8")
    empty.write_text("Too short.", encoding="utf-8")
    start = ("quantize", tiny, target, "--bits", "4")
    assert "empty.txt` holds no text of 16 tokens" in refuse(*start, "--gptq", text, "--gptq", empty)
    empty.write_text("", encoding="utf-8")
    assert "empty.txt` holds no text of 16 tokens" in refuse(*start, "--gptq", empty)
    assert "there is no file or folder" in refuse(*start, "--gptq", tmp_path / "missing.txt")
    assert "at least 1 sample, not 0" in refuse(*start, "--gptq", text, "--samples", "0")
    assert "a seed is at least 0" in refuse(*start, "--gptq", text, "--seed", "-1")
    assert "`--samples` needs `--gptq`" in refuse(*start, "--samples", "5")
    assert "cannot be divided into groups of 128" in refuse(*start, "--group", "128", "--gptq", text)
    assert not target.exists()
    run(*start)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "is not empty" in refuse(*start, "--gptq", text)
    assert "quantized already" in refuse("quantize", target, tmp_path / "again", "--bits", "4", "--gptq", text)
    broken = tmp_path / "broken"
    config = open_model(tiny).config
    state = GLM130B(config).initialize(7).state_dict()
    state["layers.1.attention.dense.weight"][0, 0] = torch.nan
    save_checkpoint(broken, config, state, tokenizer=open_model(tiny).tokenizer_path)
    said = refuse("quantize", broken, tmp_path / "again", "--bits", "4", "--gptq", text)
    assert "`layers.1.attention.dense`: a weight is not finite" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "broken"])
