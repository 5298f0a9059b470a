"""Our own format: whole or absent, checked when it is opened, memory-mapped; opening and converting whatever lies there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openglm.checkpoints import (
    Checkpoint,
    convert,
    empty_network,
    expected_shapes,
    load_into,
    load_network,
    open_checkpoint,
    open_model,
    save_checkpoint,
    save_released,
)
from openglm.config import ModelConfig
from openglm.errors import CheckpointError, ConfigError, InputError, ModelNotFoundError, OpenGLMError, StorageError

CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, inner_hidden_size=24, vocab_size=48)
SHARD = "model-00001-of-00001.safetensors"


def random_tensors(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_shapes(config).items()}


class Words:
    """A tokenizer of two files."""

    def save(self, folder: str | Path) -> list[str]:
        for name in ("words.model", "words.txt"):
            (Path(folder) / name).write_text("a b c")
        return ["words.model", "words.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, random_tensors(), tokenizer=Words(), dtype="float16")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "sharded", CONFIG, random_tensors(), max_shard_bytes=40_000)
    return tmp_path / "sharded"


# Writing and reading


@pytest.mark.parametrize("name", ["nano", "110m", "130b"])
def test_names_and_shapes_are_those_of_the_network(name: str) -> None:
    config = ModelConfig.preset(name)
    network = empty_network(config)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in network.parameters())
    shapes = expected_shapes(config)
    assert list(shapes.items()) == [(name, tuple(p.shape)) for name, p in network.named_parameters()]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.parameter_count


def test_a_checkpoint_comes_back(folder: Path) -> None:
    source = open_model(folder)
    assert isinstance(source, Checkpoint)
    assert source.config == CONFIG and source.dtype == "float16" and source.notes == []
    assert source.tokenizer_path == folder / "words.model"
    assert source.names() == list(expected_shapes(CONFIG))
    for name, tensor in random_tensors(dtype=torch.float16).items():
        assert torch.equal(source.tensor(name), tensor)
    source.verify()
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", SHARD, "model.safetensors.index.json", "checksums.json", "words.model", "words.txt"}
    values = json.loads((folder / "config.json").read_text())
    assert values["format_version"] == 1 and values["dtype"] == "float16" and values["tokenizer"] == "words.model"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_shards_are_plain_safetensors(tmp_path: Path, dtype: str) -> None:
    """Tensors may come in any order, under original names, one by one; other programs read the result."""
    tensors = random_tensors()
    pairs = (("transformer." + name, tensors[name]) for name in sorted(tensors, reverse=True))
    save_checkpoint(tmp_path / "model", CONFIG, pairs, dtype=dtype, max_shard_bytes=30_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    seen = []
    for path in shards:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                seen.append(name)
                assert index[name] == path.name
                assert torch.equal(file.get_tensor(name), tensors[name].to(getattr(torch, dtype)))
    assert sorted(seen) == sorted(tensors)
    assert open_checkpoint(tmp_path / "model").dtype == dtype


def test_without_a_dtype_the_tensors_keep_theirs(sharded: Path) -> None:
    source = open_checkpoint(sharded)
    assert source.dtype == "float32" and source.tokenizer_path is None
    assert len({*json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].values()}) > 2
    for name, tensor in random_tensors().items():
        assert torch.equal(source.tensor(name), tensor)


def test_a_tensor_that_does_not_belong_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_tensors()
    name = "layers.1.attention.dense.weight"
    for changed, words in [
        ({n: t for n, t in tensors.items() if n != name}, f"`{name}` is missing"),
        ({**tensors, name: torch.ones(3, 3)}, r"\[3, 3\], expected \[64, 64\]"),
        ({**tensors, name: torch.ones(64, 64, dtype=torch.int8)}, "int8"),
        ({**tensors, "layers.9.x": torch.ones(1)}, r"no tensor `layers\.9\.x`"),
        ({**tensors, "transformer." + name: tensors[name]}, "given twice"),
        ({**tensors, name: torch.full((64, 64), 1e6)}, "beyond 65504"),
        ({}, r"word_embeddings\.weight` is missing"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            save_checkpoint(tmp_path / "model", CONFIG, changed, dtype="float16")
    with pytest.raises(InputError, match="int4"):
        save_checkpoint(tmp_path / "model", CONFIG, tensors, dtype="int4")
    with pytest.raises(CheckpointError, match="no tokenizer file"):
        save_checkpoint(tmp_path / "model", CONFIG, tensors, tokenizer=tmp_path / "absent.model")
    assert list(tmp_path.iterdir()) == []


def test_replacing(folder: Path) -> None:
    old = open_checkpoint(folder)
    kept = old.tensor("final_layernorm.weight")
    before = kept.clone()
    with pytest.raises(StorageError, match="exists and is not empty"):
        save_checkpoint(folder, CONFIG, random_tensors())
    tensors = {name: torch.zeros_like(tensor) for name, tensor in random_tensors().items()}
    save_checkpoint(folder, CONFIG, tensors, dtype="float32", replace=True)
    assert not open_checkpoint(folder).tensor("final_layernorm.weight").any()
    assert torch.equal(kept, before), "a mapped tensor of the older checkpoint has changed"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        save_checkpoint(folder, CONFIG, tensors, replace=True)
    assert (folder / "thesis.tex").exists()


_SAVE_FOREVER = """
import sys, time, torch
from openglm.checkpoints import expected_shapes, save_checkpoint
from openglm.config import ModelConfig
config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, inner_hidden_size=24, vocab_size=48)
def tensors():
    for number, (name, shape) in enumerate(expected_shapes(config).items()):
        if number == 5:
            print("in the middle", flush=True)
            time.sleep(600)
        yield name, torch.zeros(shape)
save_checkpoint(sys.argv[1], config, tensors(), replace=True)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "model"
    if exists:
        save_checkpoint(target, CONFIG, random_tensors())
    process = subprocess.Popen([sys.executable, "-c", _SAVE_FOREVER, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"in the middle\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert target.exists() == exists
    if exists:
        open_checkpoint(target).verify()
    save_checkpoint(target, CONFIG, random_tensors(), replace=True)  # what is left of the other does not stand in the way
    open_checkpoint(target).verify()


# What is wrong with a folder


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "\n" not in message and caught.value.path is not None
    for word in words:
        assert word in message, message


def test_verify_names_a_file_with_a_flipped_byte(folder: Path, sharded: Path) -> None:
    for path in [*folder.iterdir(), *sharded.iterdir()]:
        if path.name == "checksums.json":
            continue
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(changed) * 3 // 4] ^= 1
        source = open_checkpoint(path.parent)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="checksum") as caught:
            source.verify()
        assert caught.value.path == path
        path.write_bytes(content)
        source.verify()


def test_a_half_downloaded_folder(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00005.safetensors"
    assert shard.exists(), sorted(sharded.iterdir())
    content = shard.read_bytes()
    shard.unlink()
    refuse(sharded, shard.name, "is missing", "download or copy this folder again")
    shard.with_name(shard.name + ".part").write_bytes(content[:100])
    refuse(sharded, shard.name, "unfinished", "finish the download")
    shard.write_bytes(content[:-100])
    refuse(sharded, shard.name, f"has {len(content) - 100:,} bytes, expected {len(content):,}")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(sharded, shard.name, "git-LFS pointer", "git lfs pull")
    shard.write_bytes(b"")
    refuse(sharded, shard.name, "has 0 bytes")
    shard.write_bytes(os.urandom(8) + bytes(len(content) - 8))
    refuse(sharded, shard.name, "not a whole safetensors file")
    shard.write_bytes(content)
    for name in ("config.json", "model.safetensors.index.json", "checksums.json"):
        content = (sharded / name).read_bytes()
        (sharded / name).unlink()
        refuse(sharded, name, "is missing")
        (sharded / name).write_bytes(content[: len(content) // 2])
        refuse(sharded, name)
        (sharded / name).write_bytes(content)
    open_checkpoint(sharded)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Another shard with a size that the checksums accept."""
    save_file(tensors, folder / SHARD)
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums["files"][SHARD]["size"] = (folder / SHARD).stat().st_size
    (folder / "checksums.json").write_text(json.dumps(checksums))


def test_shards_and_configuration_that_do_not_fit(folder: Path) -> None:
    tensors = random_tensors(dtype=torch.float16)
    rewrite_shard(folder, {**tensors, "word_embeddings.weight": torch.ones(40, 64).half()})
    refuse(folder, SHARD, "word_embeddings.weight", "[40, 64], expected [48, 64]", "vocabulary")
    rewrite_shard(folder, {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name})
    refuse(folder, SHARD, "lacks the tensor `layers.1.mlp.dense_h_to_4h.weight`")
    rewrite_shard(folder, random_tensors(dtype=torch.float32))
    refuse(folder, SHARD, "stored as F32", "float16")
    rewrite_shard(folder, tensors)
    open_model(folder)
    edit_json(folder / "config.json", num_layers=3)
    refuse(folder, "index.json", "lacks the tensor `layers.2.")
    edit_json(folder / "config.json", num_layers=1)
    refuse(folder, "index.json", "layers.1.", "does not have")
    edit_json(folder / "config.json", num_layers=2, hidden_size=65)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_model(folder)
    edit_json(folder / "config.json", hidden_size=64, format_version=2)
    refuse(folder, "format_version 2", "update openglm")
    edit_json(folder / "config.json", format_version=1, dtype="int3")
    refuse(folder, "'int3'")


def test_names_of_files_stay_inside_the_folder(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["word_embeddings.weight"] = "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_json(folder / "checksums.json", files={})
    refuse(folder, "does not know the file")
    edit_json(folder / "checksums.json", files={"../other.safetensors": {"size": 1, "sha256": ""}})
    refuse(folder, "checksums.json")


def test_a_person_may_edit_the_configuration(folder: Path) -> None:
    edit_json(folder / "config.json", rotary_dtype="float16")
    assert open_model(folder).config.rotary_dtype == "float16"
    assert open_model(folder, CONFIG).config.rotary_dtype == "float32"


def test_what_is_no_model_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        open_model(tmp_path / "absent")
    refuse(folder / SHARD, "is a file")
    place = tmp_path / "x"
    place.mkdir()
    refuse(place, "is empty")
    (place / "notes.txt").write_text("")
    refuse(place, "holds no model", "latest")
    (place / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (place / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (place / "model-00001-of-00002.safetensors").write_bytes(b"")
    refuse(place, "Hugging Face", "llama")
    save_released(tmp_path / "released", CONFIG, random_tensors(), iteration=9)
    refuse(tmp_path / "released" / "9", "no `latest`", "folder above")
    (tmp_path / "released" / "latest").unlink()
    refuse(tmp_path / "released", "no `latest`", "write a file `latest`")


# From a folder to a network


def test_a_network_is_loaded_into_any_dtype(folder: Path) -> None:
    half = random_tensors(dtype=torch.float16)
    for dtype in (None, "float32", torch.bfloat16):
        network = load_network(open_model(folder), dtype)
        wanted = torch.float16 if dtype is None else torch.float32 if dtype == "float32" else dtype
        for name, parameter in network.named_parameters():
            assert parameter.dtype == wanted and parameter.device.type == "cpu" and parameter.requires_grad
            assert torch.equal(parameter, half[name].to(wanted))
    with pytest.raises(InputError, match="float8"):
        load_network(open_model(folder), "float8")


def test_training_a_mapped_network_leaves_the_file_alone(folder: Path) -> None:
    source = open_model(folder)
    assert isinstance(source, Checkpoint)
    network = load_network(source)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    source.verify()
    assert open_model(folder).tensor("word_embeddings.weight").any()


def test_a_part_of_a_network_reads_only_its_own(folder: Path) -> None:
    read: list[str] = []

    class Watched(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            read.append(name)
            return super().tensor(name)

    source = open_checkpoint(folder)
    source.__class__ = Watched
    network = empty_network(CONFIG)
    del network.layers["0"]
    load_into(network, source)
    assert read == [name for name in expected_shapes(CONFIG) if "layers.0." not in name]
    larger = empty_network(ModelConfig.from_dict({**CONFIG.to_dict(), "hidden_size": 128}))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight"):
        load_into(larger, source)


_PEAK = """
import resource, sys
from openglm.checkpoints import convert
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
before = peak()
convert(sys.argv[1], sys.argv[2], dtype="float16")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_conversion_streams(tmp_path: Path) -> None:
    """128 MB in 32 layers: the peak grows by a few tensors, not by the model."""
    config = ModelConfig(num_layers=32, hidden_size=256, num_attention_heads=4, inner_hidden_size=1024, vocab_size=48)
    one = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
    save_released(tmp_path / "released", config, one, tensor_parallel=2)
    del one
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "released"), str(tmp_path / "own")]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert 4 * config.parameter_count > 120e6
    assert grown < 40e6, grown


# Conversion


def test_released_to_own(tmp_path: Path) -> None:
    tensors = random_tensors(dtype=torch.float16)
    config = ModelConfig.from_dict({**CONFIG.to_dict(), "rotary_dtype": "float16"})
    save_released(tmp_path / "released", config, tensors, tensor_parallel=4)
    (tmp_path / "released" / "unigram.model").write_bytes(b"pieces")
    steps: list[tuple[int, int]] = []
    convert(tmp_path / "released", tmp_path / "own", progress=lambda done, total: steps.append((done, total)))
    source = open_model(tmp_path / "own")
    assert isinstance(source, Checkpoint) and source.dtype == "float16"
    assert source.config == config
    assert source.tokenizer_path is not None and source.tokenizer_path.read_bytes() == b"pieces"
    assert steps == [(n, len(tensors)) for n in range(1, len(tensors) + 1)]
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor)
    source.verify()
    convert(tmp_path / "own", tmp_path / "wide", dtype="float32", tokenizer=Words())
    wide = open_model(tmp_path / "wide")
    assert wide.tokenizer_path == tmp_path / "wide" / "words.model"
    assert torch.equal(wide.tensor("final_layernorm.bias"), tensors["final_layernorm.bias"].float())
    convert(tmp_path / "own", tmp_path / "own", dtype="bfloat16", replace=True)
    assert open_checkpoint(tmp_path / "own").dtype == "bfloat16"


def test_golden_to_own(shared: Path, tmp_path: Path) -> None:
    source = convert(shared / "golden/checkpoint/tp8", tmp_path / "own")
    own = open_model(tmp_path / "own")
    assert own.config == source.config
    for name in source.names():
        assert torch.equal(own.tensor(name), source.tensor(name))


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "own", progress=stop)
    with pytest.raises(OpenGLMError, match="exists and is not empty"):
        convert(folder, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
