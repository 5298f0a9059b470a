"""Released weights: the restricted reader, and the import of any tensor-parallel degree."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openglm.checkpoints import load_network, network_from_state, open_model, open_released, save_released
from openglm.checkpoints.layout import expected_shapes
from openglm.checkpoints.pickle_reader import Placeholder
from openglm.checkpoints.torch_file import StoredTensor, read_module, read_torch_file
from openglm.config import RELEASED_SPECIAL_TOKENS, ModelConfig
from openglm.errors import CheckpointError, ConfigError, InputError
from openglm.models.glm130b import GLM130B

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


# The restricted reader


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_read_as_torch_reads_them(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(60, dtype=torch.float32).view(5, 12)
    tensors = {
        "float32": base,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "int8": torch.arange(-30, 30, dtype=torch.int8).view(3, 20),
        "same storage": base,
        "rows": base[1:3],
        "transposed": base.T,
        "every second": base[::2, 1::3],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    path = save(tmp_path / "x.pt", {"module": tensors}, pickle_protocol=protocol)
    found = read_module(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert isinstance(stored, StoredTensor)
        loaded = stored.read()
        assert loaded.dtype == tensor.dtype and loaded.is_contiguous()
        assert torch.equal(loaded, tensor.detach()), name


def test_an_ordered_dict_of_a_module(tmp_path: Path) -> None:
    """`state_dict()` carries an attribute `_metadata`, and training code leaves buffers of integers."""
    network = torch.nn.BatchNorm1d(4)
    found = read_module(save(tmp_path / "x.pt", {"module": network.state_dict()}))
    assert isinstance(found["weight"], StoredTensor) and torch.equal(found["weight"].read(), torch.ones(4))
    assert isinstance(found["num_batches_tracked"], Placeholder)


def test_other_keys_of_the_file_are_inert(tmp_path: Path) -> None:
    """What training writers add (SPEC 4.2): states of random generators, arguments, counters."""
    path = save(
        tmp_path / "x.pt",
        {
            "iteration": 49300,
            "rate": 8e-5,
            "random_rng_state": random.Random(1).getstate(),
            "np_rng_state": numpy.random.RandomState(1).get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "args": argparse.Namespace(layers=2, dtype=torch.float16),
            "counts": collections.defaultdict(list, a=[1]),
            "shape": torch.Size([1, 2]),
            "sets": ({1, 2}, frozenset([3])),
            ("a", ("tuple",)): None,
            "huge": 1 << 200,
            "module": collections.OrderedDict(w=torch.ones(2)),
        },
    )
    values = read_torch_file(path)
    assert values["iteration"] == 49300 and values["rate"] == 8e-5 and values["huge"] == 1 << 200
    assert isinstance(values["args"], Placeholder) and values["args"].what == "argparse.Namespace"
    assert list(read_module(path)) == ["w"]


class Touch:
    """Unpickling it runs a shell command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("place", ["whole", "module", "tensor", "beside", "key"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, place: str) -> None:
    trap = tmp_path / "touched"
    bad = Touch(trap)
    value = {
        "whole": bad,
        "module": {"module": bad},
        "tensor": {"module": {"transformer.word_embeddings.weight": bad}},
        "beside": {"optimizer": [bad], "module": {"w": torch.ones(1)}},
        "key": {"module": {bad: torch.ones(1)}},
    }[place]
    path = save(tmp_path / "x.pt", value)
    if place == "beside":
        assert isinstance(read_torch_file(path)["optimizer"][0], Placeholder)
        assert list(read_module(path)) == ["w"]
    else:
        with pytest.raises(CheckpointError, match=r"x\.pt") as caught:
            read_module(path)
        if place == "tensor":
            assert "posix.system" in str(caught.value) or "nt.system" in str(caught.value)
    assert not trap.exists()
    # The trap is real: Python's own unpickler falls into it.
    pickle.loads(pickle.dumps(bad))
    assert trap.exists()


def repack(source: Path, target: Path, replace: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same zip with other contents for some members (by the end of their name)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            ends = [end for end in replace if name.endswith(end)]
            new.writestr(name, replace[ends[0]] if ends else old.read(name))
    return target


def test_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", {"module": {"w": torch.ones(100)}})
    data = good.read_bytes()
    x = tmp_path / "x.pt"
    cases: list[tuple[bytes, str]] = [
        (b"", "is empty"),
        (b"<html>404</html>", "not a file that torch.save wrote"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-LFS pointer"),
        (data[:-30], "cut off"),
        (data[: len(data) // 2], "cut off"),
        (pickle.dumps({"module": {}}), "not a file that torch.save wrote"),
    ]
    for content, words in cases:
        x.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            read_module(x)
        assert str(x) in str(caught.value) and caught.value.path == x
    save(x, {"module": {}}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        read_module(x)
    for files, words in [
        ({"data/0": b"\0" * 396}, "storage `0` has 396 bytes"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"\x80\x02."}, "damaged"),
        ({"data.pkl": b"\x80\x02}q\0.X"}, "holds no dictionary of tensors under `module`"),
        ({"data.pkl": b"\x80\x02i\nos\nsystem\n."}, "instruction 0x69"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            read_module(repack(good, x, files))
    with pytest.raises(CheckpointError, match="compressed"):
        read_module(repack(good, x, {}, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match=r"absent\.pt"):
        read_module(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="directory"):
        read_module(tmp_path)


def test_a_tensor_may_not_leave_its_storage(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", {"module": {"w": torch.ones(100)}})
    text = zipfile.ZipFile(good).read("good/data.pkl")
    size = b"K\x00Kd\x85q"  # offset 0, shape (100,)
    assert size in text
    for other in (b"K\x01Kd\x85q", b"K\x00Ke\x85q", b"K\x00J\xff\xff\xff\xff\x85q", b"\x88Kd\x85q"):
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            read_module(repack(good, tmp_path / "x.pt", {"data.pkl": text.replace(size, other)}))
    endless = save(tmp_path / "endless.pt", {"module": {"w": torch.ones(1).expand(1 << 40)}})
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_module(endless)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", {"module": {"w": torch.ones(1)}})
    depth = 300_000
    for nested in (b")" + b"\x85" * depth, b"]" * depth + b"a" * (depth - 1)):
        as_key = b"\x80\x02}" + nested + b"Ns."
        with pytest.raises(CheckpointError):
            read_module(repack(good, tmp_path / "x.pt", {"data.pkl": as_key}))


def mutations(data: bytes, count: int, seed: int) -> Any:
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(max(1, len(changed)))
            match rng.randrange(5):
                case 0:
                    changed[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    changed[at : at + 1] = bytes([changed[at] ^ (1 << rng.randrange(8))]) if changed else b""
                case 2:
                    del changed[at : at + rng.choice((1, 2, 50))]
                case 3:
                    changed[at:at] = rng.randbytes(rng.choice((1, 4, 20)))
                case 4:
                    changed[at : at + rng.choice((1, 8, 64))] = bytes(rng.choice((1, 8, 64)))
        yield bytes(changed)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_mutated_file_gives_tensors_or_a_checkpoint_error(tmp_path: Path, protocol: int) -> None:
    values = {
        "module": collections.OrderedDict(a=torch.ones(3, 5), b=torch.zeros(4).half(), c=torch.ones(2, 2).T),
        "random": random.Random(1).getstate()[0],
        "args": argparse.Namespace(x=1),
    }
    good = save(tmp_path / "good.pt", values, pickle_protocol=protocol)
    x = tmp_path / "x.pt"
    refused = 0

    def check() -> None:
        nonlocal refused
        try:
            for tensor in read_module(x).values():
                if isinstance(tensor, StoredTensor):
                    tensor.read()
        except CheckpointError as error:
            refused += 1
            assert str(x) in str(error) and "\n" not in str(error)

    for content in mutations(good.read_bytes(), 300, seed=protocol):
        x.write_bytes(content)
        check()
    text = zipfile.ZipFile(good).read("good/data.pkl")
    for content in mutations(text, 500, seed=10 + protocol):
        repack(good, x, {"data.pkl": content})
        check()
    assert refused > 300


# The released layout


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


@pytest.mark.parametrize("name", ["tp4-int8", "tp8-int4"])
def test_quantized_checkpoints_are_refused(shared: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="quantized checkpoints are not read yet"):
        open_model(shared / "golden/checkpoint" / name)


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
    refuse(folder, "mp_rank_01_model_states.pt", "quantized")


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
