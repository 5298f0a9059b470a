"""`glm bench`: what it reports is there, finite and consistent; what it counts is what the network holds and does."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refuse, run
from torch.utils.flop_counter import FlopCounterMode

from openglm.config import ModelConfig, QuantizationScheme
from openglm.evaluation import ceilings
from openglm.evaluation.speed import Case, measure, prompt_flops, random_prompts, step_bytes, weight_bytes
from openglm.inference.engine import Engine
from openglm.infilling import Batch
from openglm.kernels.cpu.library import VARIANT, library
from openglm.quantization.random_weights import random_network

SMALL = ["--batch", "2,1", "--prompt", "9,5", "--new", "3", "--rounds", "2"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch, surroundings: None) -> None:
    """Ceilings in milliseconds: what they say does not matter here."""
    monkeypatch.setattr(ceilings, "CPU_BUFFER", 1 << 24)
    monkeypatch.setattr(ceilings, "LONG_ENOUGH", 0.0)


def numbers(value: Any) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [n for one in value.values() for n in numbers(one)]
    if isinstance(value, list):
        return [n for one in value for n in numbers(one)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def shape(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "inner_hidden_size": 96}
    return ModelConfig(**{**values, "vocab_size": 320, "max_sequence_length": 64, **changes})


def test_the_object_holds_every_case_and_its_shares_are_of_the_ceilings() -> None:
    found = json.loads(run("bench", "nano", *SMALL, "--threads", "1", "--json").stdout)
    assert [(row["batch"], row["prompt"]) for row in found["rows"]] == [(1, 5), (1, 9), (2, 5), (2, 9)]
    assert all(math.isfinite(n) and n > 0 for n in numbers(found))
    assert found["model"]["weights"] == "float32" and not found["model"]["random"]
    read, product = (found["ceilings"][name] for name in ("read_bytes_per_second", "product_flops_per_second"))
    weights, config = found["model"]["weight_bytes"], ModelConfig.from_json(_bundled() / "config.json")
    assert weights == 4 * config.parameter_count
    for row in found["rows"]:
        for task in ("prefill", "decode"):
            spread = row[f"{task}_tokens_per_second"]
            assert spread["min"] <= spread["median"] <= spread["max"]
        assert row["of_bandwidth"] == pytest.approx(row["decode_bytes_per_second"] / read["median"])
        assert row["of_products"] == pytest.approx(row["prefill_flops_per_second"] / product["median"])
        # A step reads all weights, and keys and values of (5 or 9) + 2 tokens a row on average, in float32.
        step = row["decode_bytes_per_second"] / row["decode_tokens_per_second"]["median"] * row["batch"]
        cached = 2 * config.num_layers * config.hidden_size * (row["prompt"] + 2) * row["batch"] * 4
        assert step == pytest.approx(weights + cached)
    again = shlex.split(found["command"])
    assert again[:3] == ["glm", "bench", "nano"]
    assert json.loads(run(*again[1:], "--json").stdout)["command"] == found["command"]


def _bundled() -> Path:
    from openglm.bundled import find_model

    return find_model("nano")


def test_table_file_and_plot() -> None:
    pytest.importorskip("matplotlib")
    shown = run("bench", *SMALL, "--out", "new/speed.json", "--plot", "speed.png").stdout.splitlines()
    assert all(len(line) <= 80 for line in shown)
    assert [line.split()[:2] for line in shown[-4:]] == [["1", "5"], ["1", "9"], ["2", "5"], ["2", "9"]]
    assert any("loaded in" in line for line in shown) and any(line.startswith("ceilings: ") for line in shown)
    assert len(json.loads(Path("new/speed.json").read_text())["rows"]) == 4
    assert Path("speed.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("random", [["--random"], []])
def test_weights_in_four_bits(tiny: Path, random: list[str]) -> None:
    words = ["bench", str(tiny), *random, "--bits", "4", "--group", "32", "--head-bits", "8", *SMALL, "--rounds", "1"]
    found = json.loads(run(*words, "--json").stdout)
    assert found["model"]["random"] == bool(random) and found["model"]["weights"].startswith(
        "4 bits, groups of 32, head in 8 bits"
    )
    assert (found["machine"]["kernels"] is not None) == (library() is not None)
    assert all(math.isfinite(n) and n > 0 for n in numbers(found["rows"]))


def test_without_compiled_kernels(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIANT, "none")
    result = run("bench", tiny, "--random", "--bits", "8", *SMALL, "--json")
    found = json.loads(result.stdout)
    assert "switched off" in result.stderr and found["ceilings"]["read_by"] == "a sum by torch"
    assert found["machine"]["kernels"] is None and found["ceilings"]["product_dtype"] == "float32"


@pytest.mark.parametrize("scheme", [None, QuantizationScheme(4, 32, head_bits=4), QuantizationScheme(8)])
def test_bytes_are_those_of_all_parameters_and_buffers(scheme: QuantizationScheme | None) -> None:
    network = random_network(shape(quantization=scheme))
    held = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    if scheme is None:
        assert held == 4 * network.config.parameter_count
    engine = Engine(network)  # packs the codes for the kernels, where there are any
    assert weight_bytes(engine.network) == held
    assert step_bytes(engine, Case(1, 5), 2) > held


def test_flops_are_those_that_torch_counts() -> None:
    config, case = shape(), Case(1, 13)
    network = random_network(config).double()  # float64 has no fused attention, whose products are not counted
    batch = Batch.stack([prompt.layout for prompt in random_prompts(config, case)])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(batch.tokens, batch.positions, batch.mask, rows=torch.tensor([case.prompt - 1]))
    assert prompt_flops(config, case.prompt) == counter.get_total_flops()


def test_prompts_are_as_long_as_asked_and_all_different() -> None:
    config = shape()
    prompts = random_prompts(config, Case(3, 8))
    assert [len(prompt.layout) for prompt in prompts] == [8, 8, 8] and {p.kind for p in prompts} == {"[gMASK]"}
    assert len({tuple(prompt.layout.tokens) for prompt in prompts}) == 3
    with pytest.raises(Exception, match="at least 3 tokens"):
        measure(Engine(random_network(config)), [Case(1, 2)], 1, 1)


def test_bad_input() -> None:
    for words, answer in (
        (["135m", "--random"], "did you mean `335m`"),
        (["335m"], "add --random"),
        (["nanno"], "did you mean `nano`"),
        (["nano", "--random", "--bits", "3"], "8 or 4 bits, not 3"),
        (["nano", "--bits", "3"], "8 or 4 bits, not 3"),
        (["nano", "--head-bits", "8"], "needs `--bits`"),
        (["nano", "--random", "--group", "64"], "needs `--bits`"),
        (["nano", "--batch", "0"], "`--batch` takes whole numbers of at least 1"),
        (["nano", "--batch", "1,two"], "not `1,two`"),
        (["nano", "--prompt", "2"], "`--prompt` takes whole numbers of at least 3"),
        (["nano", "--prompt", "60"], "exceed the context of 64"),
        (["nano", "--rounds", "0"], "`--rounds` must be at least 1"),
        (["nano", "--threads", "100000"], "`--threads` is 100000"),
        (["nano", "--prompt", "5", "--device", "abacus"], "no device `abacus`"),
        (["nano", "--prompt", "5", "--dtype", "int3"], "`int3`"),
        (["nano", "--prompt", "5", "--out", "."], "`--out` names the folder"),
    ):
        assert answer in refuse("bench", *words)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openglm.cli.bench.total_memory", lambda: 24_000_000_000)
    message = refuse("bench", "130b", "--random", "--bits", "4", "--device", "cpu")
    assert "it does not fit: 4 bits, one scale a row, context 544: this process needs" in message
    monkeypatch.setattr("openglm.cli.bench.total_memory", lambda: 600_000_000)
    words = ["--batch", "1,200", "--prompt", "512", "--device", "cpu"]
    assert "`--batch 1` would fit" in refuse("bench", "nano", "--random", *words)


@gpu
def test_on_a_gpu(tiny: Path) -> None:
    words = ["bench", str(tiny), "--random", "--bits", "4", "--group", "32", *SMALL, "--device", "cuda", "--json"]
    found = json.loads(run(*words).stdout)
    assert all(math.isfinite(n) and n > 0 for n in numbers(found["rows"]))
    assert found["peak_memory"]["of"] == "the allocator of the GPU" and found["ceilings"]["product_dtype"] == "float16"
    assert found["peak_memory"]["bytes"] >= found["model"]["weight_bytes"]
