"""What a model needs to write: the sums of 130B, what would fit, and the refusal before anything is read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from command_line import refuse, run

import openglm
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import InputError
from openglm.inference.cache import ColumnPool
from openglm.planning.inference import Use, alternatives, estimate, verdict


def gigabytes(config: ModelConfig, use: Use) -> dict[str, float]:
    return {term.name: term.bytes / 1e9 for term in estimate(config, use).terms}


def test_the_sums_of_130b() -> None:
    config = ModelConfig.preset("130b")
    plain = gigabytes(config, Use())
    assert plain["layers"] == pytest.approx(253.67, abs=0.01) and plain["keys and values"] == pytest.approx(7.05, abs=0.01)
    by_row = gigabytes(dataclasses.replace(config, quantization=QuantizationScheme(4)), Use())
    assert by_row["layers"] == pytest.approx(63.42, abs=0.01) and by_row["scales"] == pytest.approx(0.02, abs=0.005)
    assert by_row["embedding and head"] == pytest.approx(3.70, abs=0.01)
    groups = gigabytes(dataclasses.replace(config, quantization=QuantizationScheme(8, 128, head_bits=8)), Use(gpus=4))
    assert groups["layers"] == pytest.approx(126.84 / 4, abs=0.01) and groups["scales"] == pytest.approx(1.98 / 4, abs=0.01)
    assert groups["embedding and head"] == pytest.approx(1.85 / 4 * (1 + 2 / 128), abs=0.01)


def test_what_would_fit_is_told() -> None:
    config = ModelConfig.preset("130b")
    fits, sentence = verdict(estimate(config, Use()), 80e9)
    assert not fits and "4 bits, groups of 128" in sentence and "4 GPUs" in sentence
    for other in alternatives(config, Use(), 80e9):
        assert other.total <= 80e9
    small = dataclasses.replace(config, quantization=QuantizationScheme(4))
    assert verdict(estimate(small, Use()), 80e9)[0]
    fits, sentence = verdict(estimate(small, Use()), 71.5e9)
    assert not fits and "a context of" in sentence
    assert "nothing that is known here would fit" in verdict(estimate(small, Use(device="cpu")), 1e9)[1]
    with pytest.raises(InputError, match="5 GPUs do not divide the 96 heads"):
        estimate(config, Use(gpus=5))
    with pytest.raises(InputError, match="`context` must be at least 1"):
        estimate(config, Use(context=0))


def test_the_command() -> None:
    found = json.loads(run("estimate", "130b", "--bits", "4", "--gpu", "a100-80", "--json").stdout)
    assert found["fits"] and sum(found["terms"].values()) == pytest.approx(found["bytes"], abs=10)
    assert "it does not fit" in run("estimate", "130b", "--gpu", "a100-80", code=1).stdout
    assert "it fits" in run("estimate", "nano", "--cpu").stdout
    for arguments, words in (
        (["130b", "--bits", "3"], "8 or 4 bits, not 3"),
        (["130b", "--group", "64"], "needs `--bits`"),
        (["130b", "--gpu", "a100"], "no GPU `a100`"),
        (["130b", "--gpus", "5"], "do not divide the 96 heads"),
        (["130b", "--memory", "0"], "`--memory` must be above 0"),
        (["nowhere"], "nowhere"),
    ):
        assert words in refuse("estimate", *arguments)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(monkeypatch) -> None:
    monkeypatch.setattr("openglm.inference.loading.total_memory", lambda: 450_000_000)
    with pytest.raises(InputError, match="it does not fit: float32, context 1: this process needs"):
        openglm.load("nano")
    assert openglm.load("nano", dtype="float16").config.num_layers == 8  # memory-mapped as stored


def test_a_cache_of_8_bits_counts_its_scales() -> None:
    config = ModelConfig.preset("130b")
    sizes = {}
    for cache in ("float16", "int8"):
        (term,) = [term for term in estimate(config, Use(cache=cache)).terms if term.name == "keys and values"]
        sizes[cache] = term.bytes
    assert sizes["int8"] == sizes["float16"] * (1 + 4 / 128) / 2
    pool = ColumnPool(ModelConfig.preset("nano"), 7, dtype=torch.int8)
    assert pool.scales is not None
    held = pool.keys.nbytes + pool.values.nbytes + pool.scales.nbytes
    (term,) = [
        t for t in estimate(ModelConfig.preset("nano"), Use(cache="int8", context=7)).terms if t.name == "keys and values"
    ]
    assert held == term.bytes
