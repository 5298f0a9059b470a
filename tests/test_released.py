"""Released weights: the import of any tensor-parallel degree."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openglm.checkpoints import load_network, network_from_state, open_model, open_released, save_released
from openglm.checkpoints.layout import expected_shapes
from openglm.checkpoints.loading import convert_source
from openglm.config import QUANTIZED_MATRICES, RELEASED_SPECIAL_TOKENS, ModelConfig, QuantizationScheme
from openglm.errors import CheckpointError, ConfigError, InputError
from openglm.models.glm130b import GLM130B, RotaryTable
from openglm.quantization.functional import pack, quantize_matrix

CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=8, inner_hidden_size=24, vocab_size=48)


def random_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_shapes(config).items()}


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def shard(folder: Path, rank: int) -> Path:
    return folder / "7" / f"mp_rank_{rank:02d}_model_states.pt"


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    module = torch.load(path, weights_only=True)["module"]
    change(module)
    torch.save({"module": module}, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released folder over four ranks, with a config.json beside `latest`."""
    save_released(tmp_path / "model", CONFIG, random_tensors(CONFIG), tensor_parallel=4, iteration=7)
    return tmp_path / "model"


@pytest.mark.parametrize("ranks", ["tp1", "tp4", "tp8"])
def test_golden_tensors_are_the_same_from_any_number_of_ranks(shared: Path, ranks: str) -> None:
    whole = torch.load(
        shared / "golden/checkpoint/tp1/49300/mp_rank_00_model_states.pt", weights_only=True, map_location="cpu"
    )["module"]
    source = open_released(shared / "golden/checkpoint" / ranks)
    assert source.tensor_parallel == int(ranks[2:]) and source.dtype == "float16"
    assert source.config.rotary_dtype == "float16" and source.config.special_tokens["sop"] == 504
    assert source.tokenizer_path is None
    assert ["transformer." + name for name in source.names()] == list(whole)
    for name in source.names():
        assert torch.equal(source.tensor(name), whole["transformer." + name]), name


@pytest.mark.parametrize("ranks", ["tp1", "tp4", "tp8"])
@pytest.mark.parametrize("table", ["float16", "float32"])
def test_golden_logits(shared: Path, ranks: str, table: str) -> None:
    golden = load_file(shared / "golden/checkpoint/logits.safetensors")
    config = dataclasses.replace(open_released(shared / "golden/checkpoint" / ranks).config, rotary_dtype=table)
    network = load_network(open_released(shared / "golden/checkpoint" / ranks, config), "float32")
    tokens, positions = golden["input_ids"].long(), golden["position_ids"].long()
    may_attend = ~golden["attention_mask_true_is_hidden"].squeeze(1)
    with torch.no_grad():
        logits = network(tokens, positions, may_attend)
    recorded = golden[f"{ranks}/{table}/logits"]
    assert (logits - recorded).abs().max() <= 1e-5 * recorded.abs().max()


def test_golden_half_precision(shared: Path) -> None:
    golden = load_file(shared / "golden/checkpoint/logits.safetensors")
    network = load_network(open_released(shared / "golden/checkpoint/tp1"))
    assert network.word_embeddings.weight.dtype == torch.float16
    with torch.no_grad():
        logits = network(
            golden["input_ids"].long(),
            golden["position_ids"].long(),
            ~golden["attention_mask_true_is_hidden"].squeeze(1),
        )
    assert (logits.float() - golden["tp1/half/logits"].float()).abs().max() < 0.15


@pytest.mark.parametrize(("name", "bits", "ranks"), [("tp4-int8", 8, 4), ("tp8-int4", 4, 8)])
@pytest.mark.parametrize("table", ["float16", "float32"])
def test_golden_quantized_shards(shared: Path, tmp_path: Path, name: str, bits: int, ranks: int, table: str) -> None:
    golden = load_file(shared / "golden/checkpoint/logits.safetensors")
    source = open_model(shared / "golden/checkpoint" / name)
    assert source.config.quantization == QuantizationScheme(bits, ranks=ranks)
    convert_source(source, tmp_path / "ours", dtype=None)
    converted = open_model(tmp_path / "ours")
    assert converted.config == source.config
    for each in (source, converted):
        network = load_network(each, "float32")
        network.rotary = RotaryTable(source.config.head_size, table)
        with torch.no_grad():
            logits = network(
                golden["input_ids"].long(),
                golden["position_ids"].long(),
                ~golden["attention_mask_true_is_hidden"].squeeze(1),
            )
        recorded = golden[f"{name}/{table}/logits"]
        assert (logits - recorded).abs().max() <= 1e-5 * recorded.abs().max()


def quantized_shards(folder: Path, bits: int, ranks: int) -> dict[str, torch.Tensor]:
    """A released folder as the original's tool quantizes it, after the split; returns whole dequantized weights."""
    tensors = random_tensors(CONFIG)
    save_released(folder, CONFIG, tensors, tensor_parallel=ranks, iteration=7)
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(ranks):

        def quantize(module: dict) -> None:
            for name in [name for name in module if name.removesuffix(".weight").endswith(QUANTIZED_MATRICES)]:
                made = quantize_matrix(module[name], QuantizationScheme(bits))
                module[name] = made.codes if bits == 8 else pack(made.codes)
                module[name + "_scale"] = made.scales.squeeze(1)
                parts.setdefault(name.removeprefix("transformer."), []).append(made.dequantize())

        edit(shard(folder, rank), quantize)
    whole = {}
    for name, own in parts.items():
        if "dense_h_to_4h" in name:
            whole[name] = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in own])
        else:
            whole[name] = torch.cat(own, dim=0 if "query_key_value" in name else 1)
    return whole


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_quantized_shards_are_joined_without_loss(tmp_path: Path, bits: int, ranks: int) -> None:
    whole = quantized_shards(tmp_path / "m", bits, ranks)
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"quantization_bits": bits}))
    network = load_network(open_model(tmp_path / "m"), "float32")
    for name, weight in whole.items():
        module = network.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight.dequantize(), weight), name
    convert_source(open_model(tmp_path / "m"), tmp_path / "ours", dtype=None)
    again = load_network(open_model(tmp_path / "ours"), "float32")
    for name, buffer in network.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    with pytest.raises(ConfigError, match="quantized already"):
        convert_source(open_model(tmp_path / "m"), tmp_path / "twice", scheme=QuantizationScheme(8))
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"quantization_bits": 12 - bits}))
    with pytest.raises(CheckpointError, match=rf"says {12 - bits} bits, but the shards hold {bits} bits"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_split_and_join(tmp_path: Path, ranks: int) -> None:
    tensors = random_tensors(CONFIG)
    save_released(tmp_path / "m", CONFIG, {"transformer." + n: t for n, t in tensors.items()}, tensor_parallel=ranks)
    source = open_model(tmp_path / "m")
    assert len(list((tmp_path / "m" / "1").iterdir())) == ranks
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor), name
    with pytest.raises(CheckpointError, match="no tensor `nonsense`"):
        source.tensor("nonsense")


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 ranks do not divide `num_attention_heads` 8"):
        save_released(tmp_path / "m", CONFIG, random_tensors(CONFIG), tensor_parallel=5)


def test_prefix_buffers_unknown_tensors_and_a_newline_in_latest(folder: Path) -> None:
    def change(module: dict[str, Tensor]) -> None:
        for name in list(module):
            module[name.removeprefix("transformer.")] = module.pop(name)
        module["mixins.rotary-embedding.rotary_emb.inv_freq"] = torch.ones(4)
        module["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
        module["transformer.position_embeddings.weight"] = torch.ones(4)

    for rank in range(4):
        edit(shard(folder, rank), change)
    (folder / "latest").write_text(" 7\n")
    source = open_released(folder)
    assert source.notes == ["unknown tensors are ignored: transformer.position_embeddings.weight"]
    assert torch.equal(source.tensor("word_embeddings.weight"), random_tensors(CONFIG)["word_embeddings.weight"])


def test_the_word_release(folder: Path) -> None:
    (folder / "7").rename(folder / "release")
    (folder / "latest").write_text("release")
    assert open_released(folder).tensor_parallel == 4


def test_where_the_configuration_comes_from(folder: Path) -> None:
    assert open_released(folder).config == CONFIG  # beside `latest`, where save_released wrote it in full
    other = ModelConfig.from_dict({**CONFIG.to_dict(), "num_attention_heads": 4})
    assert open_released(folder, other).config == other
    (folder / "config.json").unlink()
    values = {key: value for key, value in CONFIG.to_dict().items() if key != "rotary_dtype"}
    assert open_released(folder, values).config.rotary_dtype == "float16"
    with pytest.raises(CheckpointError, match=r"hidden size 64, no multiple of 128.*config"):
        open_released(folder)
    with pytest.raises(ConfigError, match="did you mean `num_layers`"):
        open_released(folder, {**values, "num_layer": 2})


def test_a_deduced_configuration_says_so(tmp_path: Path) -> None:
    config = ModelConfig(3, 256, 2, 40, 150_528, special_tokens=RELEASED_SPECIAL_TOKENS, rotary_dtype="float16")
    tensors = {name: torch.randn(1).expand(shape) for name, shape in expected_shapes(config).items()}
    tensors["word_embeddings.weight"] = torch.randn(256).half().expand(150_528, 256) * torch.arange(150_528).half()[:, None]
    save_released(tmp_path / "m", config, {name: t.half() for name, t in tensors.items()}, tensor_parallel=2)
    (tmp_path / "m" / "config.json").unlink()
    source = open_model(tmp_path / "m")
    assert source.config == config
    assert "num_layers 3, hidden_size 256, num_attention_heads 2" in source.notes[0]
    assert "inner_hidden_size 40, vocab_size 150,528" in source.notes[0]


# What is wrong with it


def refuse(folder: Path, *words: str, config: ModelConfig | None = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_released(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_missing_shard(folder: Path, rank: int) -> None:
    shard(folder, rank).unlink()
    refuse(folder, f"mp_rank_0{rank}_model_states.pt", "is missing")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_shard(folder: Path, part: float) -> None:
    path = shard(folder, 2)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refuse(folder, "mp_rank_02_model_states.pt", "download or copy this file again")


def test_a_shard_that_shrinks_after_it_was_opened(folder: Path) -> None:
    source = open_released(folder)
    path = shard(folder, 2)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"mp_rank_02.*became shorter"):
        source.tensor("word_embeddings.weight")


def test_shards_of_other_models(folder: Path, tmp_path: Path) -> None:
    save_released(tmp_path / "other", CONFIG, random_tensors(CONFIG, seed=1), tensor_parallel=4, iteration=7)
    original = shard(folder, 2).read_bytes()
    shutil.copy(shard(tmp_path / "other", 2), shard(folder, 2))
    refuse(folder, "mp_rank_02_model_states.pt", "another model")
    shutil.copy(shard(folder, 1), shard(folder, 2))
    refuse(folder, "mp_rank_02_model_states.pt", "is a copy of `mp_rank_01_model_states.pt`")
    wide = ModelConfig(2, 128, 8, 24, 48)
    save_released(tmp_path / "wide", wide, random_tensors(wide), tensor_parallel=4, iteration=7)
    shutil.copy(shard(tmp_path / "wide", 2), shard(folder, 2))
    refuse(folder, "mp_rank_02_model_states.pt", "[12, 128]", "[12, 64]", "word_embeddings.weight")
    save(shard(folder, 2), {"module": {"bert.weight": torch.ones(3)}})
    refuse(folder, "mp_rank_02_model_states.pt", "lacks the tensor `transformer.word_embeddings.weight`")
    shard(folder, 2).write_bytes(original)
    shutil.copy(shard(tmp_path / "other", 2), shard(folder, 4))
    refuse(folder, "one of 4 shards", "holds 5")


def test_copies_that_drifted_a_little_are_a_note(folder: Path) -> None:
    edit(shard(folder, 3), lambda module: module["transformer.final_layernorm.weight"].mul_(1.01))
    assert "copies differ a little" in open_released(folder).notes[0]


def test_a_missing_key_names_file_and_key(folder: Path) -> None:
    edit(shard(folder, 1), lambda module: module.pop("transformer.layers.1.mlp.dense_h_to_4h.bias"))
    refuse(folder, "mp_rank_01_model_states.pt", "transformer.layers.1.mlp.dense_h_to_4h.bias")


def test_a_wrong_type_names_file_and_key(folder: Path) -> None:
    name = "transformer.layers.1.mlp.dense_h_to_4h.bias"
    edit(shard(folder, 1), lambda module: module.update({name: module[name].float()}))
    refuse(folder, "mp_rank_01_model_states.pt", name, "float32")
    edit(shard(folder, 1), lambda module: module.update({name: module[name].long()}))
    refuse(folder, "mp_rank_01_model_states.pt", name, "LongStorage")
    edit(shard(folder, 1), lambda module: module.update({name: module[name].to(torch.int8)}))
    refuse(folder, "mp_rank_01_model_states.pt", name, "int8")


def test_a_configuration_of_another_size(folder: Path) -> None:
    values = CONFIG.to_dict()
    refuse(
        folder,
        "word_embeddings.weight",
        "vocab_size",
        "[12, 64]",
        "[16, 64]",
        config=ModelConfig.from_dict({**values, "vocab_size": 64}),
    )
    refuse(folder, "layers.2", config=ModelConfig.from_dict({**values, "num_layers": 3}))
    refuse(folder, "layers.1", "beyond the 1 layers", config=ModelConfig.from_dict({**values, "num_layers": 1}))
    refuse(folder, "dense_h_to_4h", config=ModelConfig.from_dict({**values, "inner_hidden_size": 28}))
    refuse(folder, "vocab_size", "do not divide", config=ModelConfig.from_dict({**values, "vocab_size": 50}))


def test_latest(folder: Path) -> None:
    for text, words in [
        ("", "''"),
        ("0", "'0'"),
        ("-3", "'-3'"),
        ("../7", "'../7'"),
        ("newest", "'newest'"),
        ("8", "no folder"),
    ]:
        (folder / "latest").write_text(text)
        refuse(folder, "latest", words)


# From names to a network


def test_a_network_from_original_names() -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    network = network_from_state(CONFIG, {"transformer." + name: tensor for name, tensor in tensors.items()})
    assert isinstance(network, GLM130B) and not network.training
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, tensors[name])
    with torch.no_grad():
        network.word_embeddings.weight.zero_()
    assert tensors["word_embeddings.weight"].any()
    assert network_from_state(CONFIG, tensors, "bfloat16").word_embeddings.weight.dtype == torch.bfloat16


def test_a_state_that_does_not_fit_names_the_key() -> None:
    tensors = random_tensors(CONFIG)
    name = "layers.1.attention.dense.weight"
    for changed, words in [
        ({n: t for n, t in tensors.items() if n != name}, f"`{name}` is missing"),
        ({**tensors, name: torch.ones(3, 3)}, r"\[3, 3\], expected \[64, 64\]"),
        ({**tensors, name: torch.ones(64, 64, dtype=torch.int8)}, "int8"),
        ({**tensors, "layers.9.x": torch.ones(1)}, "no tensor `layers.9.x`"),
    ]:
        with pytest.raises(CheckpointError, match=words) as caught:
            network_from_state(CONFIG, changed)
        assert caught.value.key
