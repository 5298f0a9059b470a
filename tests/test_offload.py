"""Layers in host memory and on disk: the same bits as a resident model, in less memory, and errors in one sentence."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refuse, run
from torch import Tensor

import openglm
from openglm.checkpoints import open_model, save_checkpoint, save_released
from openglm.checkpoints.loading import convert_source, empty_network
from openglm.config import ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.errors import CheckpointError, InputError
from openglm.inference.glm import GLM
from openglm.inference.offload import StreamedLayer, load_streamed, streamed_layers
from openglm.infilling import generation_prompt
from openglm.kernels.cpu.library import VARIANT, variants
from openglm.models.glm130b import GLM130B
from openglm.planning.inference import Use, estimate, layers_that_fit
from openglm.tokenizers import load_tokenizer
from openglm.tokenizers.unigram import UnigramTokenizer

TEXTS = ["The [MASK] is blue.", "山里有 [MASK] 庙。", "Once [MASK] a time", "The capital of France is"]
KERNELS = [pytest.param("", id="kernels", marks=pytest.mark.skipif(not variants(), reason="not compiled")), "none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: UnigramTokenizer) -> Path:
    """A model of seven layers with random weights, in float16."""
    special = {name: token for name, token in tiny_tokenizer.special_tokens.items() if name != "unk"}
    masks = ("[MASK]", "[gMASK]")
    config = ModelConfig(7, 64, 2, 96, tiny_tokenizer.vocab_size, 64, special_tokens=special, learned_masks=masks)
    folder = tmp_path_factory.mktemp("models") / "seven"
    network = GLM130B(config).initialize(7)
    save_checkpoint(folder, config, dict(network.named_parameters()), tokenizer=tiny_tokenizer, dtype="float16")
    return folder


def quantized(model: Path, scheme: Scheme) -> Path:
    folder = model.with_name(f"{scheme.bits}-{scheme.group}-{scheme.head_bits}-{scheme.zero_point}")
    if not folder.exists():
        convert_source(open_model(model), folder, scheme=scheme)
    return folder


def budget(folder: Path, resident: int, dtype: str = "float32") -> float:
    """Bytes with which so many layers stay."""
    found = estimate(config := open_model(folder).config, Use(dtype, dtype, context=config.max_sequence_length, device="cpu"))
    sizes = {term.name: term.bytes for term in found.terms}
    layer = sum(sizes.get(name, 0) for name in ("layers", "scales", "biases and norms")) / config.num_layers
    return sum(sizes.values()) - sizes["reserve"] - (config.num_layers - resident - 2) * layer + 1


def streamed(glm: GLM) -> list[int]:
    return [int(number) for number, layer in glm.network.layers.items() if isinstance(layer, StreamedLayer)]


def logits(glm: GLM) -> Tensor:
    """Of a pass through the engine, prompts of two lengths and then some steps."""
    prompts = [generation_prompt(ids, glm.config.special_tokens, kind="[gMASK]") for ids in ([9, 30, 31, 32, 33], [40, 41])]
    running = glm.engine.prefill(prompts, 4)
    found = [running.logits, *(running.append(torch.tensor([token, token + 1])) for token in (50, 60, 70))]
    return torch.stack(found)


def load(folder: Path, place: str, resident: int = 2, dtype: torch.dtype = torch.float32, slots: int = 2) -> GLM:
    source = open_model(folder)
    network = empty_network(source.config)
    load_streamed(network, source, dtype, torch.device("cpu"), resident=resident, place=place, slots=slots)
    tokenizer = load_tokenizer(source.tokenizer_path) if source.tokenizer_path else None
    return GLM(network.eval().requires_grad_(False), tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["host", "disk"])
def test_plain_layers_give_the_same_bits(model: Path, place: str, dtype: torch.dtype) -> None:
    whole, found = openglm.load(model, dtype=dtype, device="cpu"), load(model, place, dtype=dtype)
    assert streamed(found) == [1, 2, 4, 5, 6] and not streamed(whole)
    assert torch.equal(logits(found), logits(whole))
    assert found.fill_batch(TEXTS, max_tokens=8) == whole.fill_batch(TEXTS, max_tokens=8)
    assert found.score(TEXTS[0], ["sky", "king"]) == whole.score(TEXTS[0], ["sky", "king"])


@pytest.mark.parametrize("variant", KERNELS)
@pytest.mark.parametrize(
    "scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 32, head_bits=8), Scheme(8, 32, zero_point=True)], ids=str
)
def test_quantized_layers_give_the_same_bits(monkeypatch, model: Path, scheme: Scheme, variant: str) -> None:
    monkeypatch.setenv(VARIANT, variant)
    folder = quantized(model, scheme)
    whole = openglm.load(folder, device="cpu")
    for place, resident in (("host", 0), ("disk", 3)):
        found = load(folder, place, resident)
        assert len(streamed(found)) == 7 - resident
        assert (found.engine.kernel is None) == (whole.engine.kernel is None) == (variant == "none" or scheme.zero_point)
        assert torch.equal(logits(found), logits(whole))
        assert found.fill_batch(TEXTS, max_tokens=8) == whole.fill_batch(TEXTS, max_tokens=8)
        assert found.score(TEXTS[0], ["sky", "king"]) == whole.score(TEXTS[0], ["sky", "king"])


def test_quantized_layers_in_half_precision_give_the_same_bits(model: Path) -> None:
    folder = quantized(model, Scheme(4, 32))
    assert torch.equal(
        logits(load(folder, "disk", 1, torch.bfloat16)), logits(openglm.load(folder, dtype="bfloat16", device="cpu"))
    )


@pytest.mark.parametrize("cache", ["int8", "float32"])
def test_the_kernels_find_each_layers_part_of_the_cache(model: Path, cache: str) -> None:
    folder = quantized(model, Scheme(4, 32))
    whole, found = openglm.load(folder, device="cpu", cache_dtype=cache), load(folder, "disk")
    found.engine.set_cache_dtype(cache)
    assert torch.equal(logits(found), logits(whole))


def test_every_kind_of_request_works(model: Path) -> None:
    whole = openglm.load(model, device="cpu")
    for draft in (None, "lookup"):
        found = openglm.load(model, device="cpu", draft=draft, offload="disk", memory=budget(model, 1))
        settings: tuple[dict[str, Any], ...] = ({"num_beams": 3}, {"temperature": 0.8, "seed": 3}, {"no_repeat_ngram_size": 2})
        for options in settings:
            assert found.fill(TEXTS[0], max_tokens=9, **options).text == whole.fill(TEXTS[0], max_tokens=9, **options).text
        assert "".join(found.stream(TEXTS[3], max_tokens=9)) == "".join(whole.stream(TEXTS[3], max_tokens=9))


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 9])
def test_any_number_of_slots(model: Path, slots: int) -> None:
    wanted = logits(openglm.load(model, device="cpu"))
    for resident in (0, 6):
        assert torch.equal(logits(load(model, "disk", resident, slots=slots)), wanted)


def test_a_released_model_is_streamed_too(tmp_path: Path, model: Path) -> None:
    source = open_model(model)
    save_released(
        tmp_path / "released", source.config, {name: source.tensor(name) for name in source.names()}, tensor_parallel=2
    )
    whole = openglm.load(tmp_path / "released", device="cpu")
    for place in ("host", "disk"):
        assert torch.equal(logits(load(tmp_path / "released", place)), logits(whole))


def test_layers_stay_as_long_as_they_fit(model: Path) -> None:
    for resident in range(5):
        assert len(streamed(openglm.load(model, device="cpu", offload="auto", memory=budget(model, resident)))) == 7 - resident
    half = (budget(model, 1) - budget(model, 0)) / 2  # of a layer: what it takes in float16
    for offload, dtype in (("host", "float16"), ("disk", "float32")):
        with pytest.raises(InputError, match="2 layers at a time need"):
            openglm.load(model, device="cpu", dtype=dtype, offload=offload, memory=budget(model, 0, dtype) - 2)
    found = openglm.load(model, device="cpu", offload="host", memory=budget(model, 0) + 7 * half)
    assert len(streamed(found)) == 7 and any("host memory" in note for note in found.notes)
    for place in ("auto", "host", "disk"):
        assert not streamed(openglm.load(model, device="cpu", offload=place))  # the machine has enough
    assert [len(streamed_layers(48, stay)) for stay in (0, 1, 47, 48)] == [48, 47, 1, 0]
    # GLM-10B on a card of 24 GB, and 130B in 4 bits.
    ten, big = ModelConfig.preset("10b"), ModelConfig.preset("130b", quantization=Scheme(4))
    assert (
        layers_that_fit(estimate(ten, Use()), 24 * 2**30, 2) == 48 and 20 < layers_that_fit(estimate(ten, Use()), 16e9, 2) < 48
    )
    assert 5 < layers_that_fit(estimate(big, Use()), 24 * 2**30, 2) < 20


def test_a_model_that_is_too_large_is_told_the_way_out(monkeypatch, model: Path) -> None:
    monkeypatch.setattr("openglm.inference.loading.total_memory", lambda: 401_000_000)
    with pytest.raises(InputError, match=r"does not fit.*offload"):
        openglm.load(model, device="cpu")


def test_bad_values_are_refused(surroundings: None) -> None:
    text = "The sky is [MASK]."
    assert "`--offload` must be auto, host or disk, not 'cloud'" in refuse("fill", text, "--offload", "cloud")
    assert "`--memory` goes with `offload`" in refuse("fill", text, "--memory", "4")
    assert "`--memory` must be above 0" in refuse("generate", "The sky", "--offload", "disk", "--memory", "0")
    assert "layers at a time need" in refuse("fill", text, "--offload", "disk", "--memory", "0.0001")
    assert run("fill", text, "--offload", "disk", "--max-tokens", "3").stdout == run("fill", text, "--max-tokens", "3").stdout


def test_a_file_that_goes_or_changes_ends_in_one_sentence(tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    found = load(folder, "disk")
    answer = found.fill(TEXTS[0], max_tokens=4)
    (shard,) = folder.glob("*.safetensors")
    away = shard.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"cannot read `.*safetensors`: No such file"):
        found.fill(TEXTS[0], max_tokens=4)
    away.rename(shard)  # a drive that is there again
    assert found.fill(TEXTS[0], max_tokens=4) == answer
    shutil.copyfile(shard, away)
    away.rename(shard)
    with pytest.raises(CheckpointError, match="has changed since it was opened; load the model again"):
        found.fill(TEXTS[0], max_tokens=4)


def test_no_thread_is_left_behind(model: Path) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("openglm-offload") for thread in threading.enumerate())

    gc.collect()
    found = load(model, "disk")
    found.fill(TEXTS[0], max_tokens=2)
    assert threads() >= 1
    del found
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


MEASURE = """
import sys, torch
import openglm
from openglm.infilling import generation_prompt
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
openglm.load(sys.argv[2], device="cpu").fill("The [MASK] is blue.", max_tokens=2)  # libraries are there
before = anonymous()
glm = openglm.load(sys.argv[1], device="cpu", offload=sys.argv[3], memory=float(sys.argv[4]))
most = anonymous()
running = glm.engine.prefill([generation_prompt([9, 30, 31], glm.config.special_tokens, kind="[gMASK]")], 8)
for token in range(2):
    running.append(torch.tensor([token]))
    most = max(most, anonymous())
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory is anonymous")
def test_memory_stays_within_what_was_given(tmp_path: Path, model: Path) -> None:
    config = ModelConfig(8, 1024, 8, 2816, 320, 64, special_tokens=open_model(model).config.special_tokens)
    weights = torch.empty(2 * 2816 * 1024, dtype=torch.float16).normal_(0, 0.02)
    tensors = ((name, weights[: own.numel()].view(own.shape)) for name, own in empty_network(config).named_parameters())
    save_checkpoint(tmp_path / "large", config, tensors, dtype="float16")
    size = sum(path.stat().st_size for path in (tmp_path / "large").iterdir())
    assert size > 200e6  # twice as much in float32
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(model), "disk", "170e6"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 150e6 < int(done.stdout) < 170e6 + 32e6  # three layers of eight, and what allocators keep for later
