"""Quantized models on disk: written tensor by tensor, read back as they were, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from openglm import load
from openglm.checkpoints import open_checkpoint, open_model, save_checkpoint
from openglm.checkpoints.loading import convert_source, load_into, load_network
from openglm.checkpoints.quantizing import QuantizingSource
from openglm.checkpoints.rank import RankSource
from openglm.config import ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.errors import CheckpointError, ConfigError, InputError
from openglm.models.glm130b import GLM130B
from openglm.parallel.cut import TensorCut
from openglm.quantization.layers import QuantizedLinear, quantize

CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, inner_hidden_size=96, vocab_size=80)
SCHEMES = [Scheme(8), Scheme(4), Scheme(4, 32), Scheme(8, 32, zero_point=True), Scheme(4, 32, clip=True)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    network = GLM130B(CONFIG).initialize(2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    save_checkpoint(folder, CONFIG, network.state_dict(), dtype="float16")
    return folder


def logits(network: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 80, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(tokens, torch.arange(15).expand(2, 15))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_converted_model_is_the_quantized_network(plain, tmp_path, monkeypatch, scheme: Scheme) -> None:
    monkeypatch.setattr("openglm.checkpoints.loading.SLICE", 64 * 24)  # so that each matrix is quantized in slices
    errors = convert_source(open_model(plain), tmp_path / "small", scheme=scheme)
    source = open_checkpoint(tmp_path / "small")
    assert source.config == dataclasses.replace(CONFIG, quantization=scheme) and source.dtype == "float16"
    source.verify()
    expected = load_network(open_model(plain), "float32")
    wanted = quantize(expected, scheme)
    assert [error.name for error in errors] == [error.name for error in wanted]
    for one, other in zip(errors, wanted, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3) and one.bytes == other.bytes
    network = load_network(source, "float32")
    assert torch.equal(logits(network), logits(expected))
    # The configuration alone says how: codes and scales keep their types whatever the others are loaded as.
    half = load_network(source)
    module = half.get_submodule("layers.0.mlp.dense_h_to_4h")
    assert isinstance(module, QuantizedLinear) and module.scales.dtype == torch.float16 and module.codes.dtype == torch.int8
    assert half.word_embeddings.weight.dtype == torch.float16
    small, large = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tmp_path / "small", plain))
    assert small < (0.75 if scheme.bits == 8 else 0.6) * large


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, head_bits=8), Scheme(4, 32, head_bits=4)], ids=str)
def test_quantized_as_it_is_read(plain, tmp_path, monkeypatch, scheme: Scheme) -> None:
    monkeypatch.setattr("openglm.checkpoints.loading.SLICE", 64 * 24)
    convert_source(open_model(plain), tmp_path / "small", scheme=scheme)
    kept, made = open_model(tmp_path / "small"), QuantizingSource(open_model(plain), scheme)
    assert made.config == kept.config and made.names() == kept.names()
    for name in kept.names():
        assert torch.equal(made.tensor(name), kept.tensor(name)), name
    # Parts of ranks, codes before scales and the other way round.
    for rank in range(2):
        cut = TensorCut(kept.config, rank, 2)
        for name in [*kept.names(), *reversed(kept.names())]:
            assert torch.equal(RankSource(made, cut).tensor(name), RankSource(kept, cut).tensor(name)), name
    glm = load(plain, bits=scheme.bits, group=scheme.group, head_bits=scheme.head_bits)
    assert glm.config == kept.config
    ids = [20, 30, glm.config.special_tokens["[MASK]"], 40, glm.config.special_tokens["eos"]]
    stored = load(tmp_path / "small")
    assert glm.fill_ids(ids, search="greedy", max_length=24) == stored.fill_ids(ids, search="greedy", max_length=24)


def test_fill_and_score_run_on_a_quantized_model(plain, tmp_path) -> None:
    convert_source(open_model(plain), tmp_path / "small", scheme=Scheme(8))
    glm, exact = load(tmp_path / "small"), load(plain)
    ids = [20, 30, glm.config.special_tokens["[MASK]"], 40, glm.config.special_tokens["eos"]]
    assert glm.fill_ids(ids, search="greedy", max_length=24) == glm.fill_ids(ids, search="greedy", max_length=24)
    assert (logits(glm.network) - logits(exact.network)).abs().max() < 0.1 * logits(exact.network).abs().max()


def test_what_is_refused_of_a_model_that_is_read(plain, tmp_path) -> None:
    with pytest.raises(ConfigError, match="8 or 4 bits, not 5"):
        load(plain, bits=5)
    with pytest.raises(ConfigError, match="`group` needs `bits`"):
        load(plain, group=32)
    with pytest.raises(InputError, match="does not go with offloaded layers"):
        load(plain, bits=8, offload="disk")
    with pytest.raises(ConfigError, match=r"rows of 64 weights .* groups of 128"):
        load(plain, bits=4, group=128)
    convert_source(open_model(plain), tmp_path / "small", scheme=Scheme(4))
    with pytest.raises(ConfigError, match="quantized already"):
        load(tmp_path / "small", bits=4)


def test_what_is_refused(plain, tmp_path) -> None:
    small = tmp_path / "small"
    with pytest.raises(ConfigError, match=r"rows of 64 weights .* groups of 128"):
        convert_source(open_model(plain), small, scheme=Scheme(4, 128))
    assert not small.exists()
    convert_source(open_model(plain), small, scheme=Scheme(4, 32))
    with pytest.raises(ConfigError, match="quantized already"):
        convert_source(open_model(small), tmp_path / "again", scheme=Scheme(8))
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="no tensor `layers") as raised:
        load_into(GLM130B(CONFIG), open_model(small))
    assert "it is quantized" in str(raised.value.hint)
    # A copy keeps its codes.
    convert_source(open_model(small), tmp_path / "copy", dtype="float32")
    assert torch.equal(logits(load_network(open_model(tmp_path / "copy"))), logits(load_network(open_model(small), "float32")))
    settings = json.loads((small / "config.json").read_text())
    for wrong, words in (({"bits": 5}, "8 or 4 bits"), ({"bits": 4, "grup": 32}, "no key `grup`"), (4, "a table")):
        (small / "config.json").write_text(json.dumps({**settings, "quantization": wrong}))
        with pytest.raises(ConfigError, match=words):
            open_checkpoint(small)
    # A configuration that says other than what lies there.
    for wrong in ({"bits": 8}, {"bits": 4, "group": 32, "zero_point": True}, None):
        (small / "config.json").write_text(json.dumps({**settings, "quantization": wrong}))
        with pytest.raises(CheckpointError, match=r"has the shape|lacks the tensor"):
            open_checkpoint(small)
