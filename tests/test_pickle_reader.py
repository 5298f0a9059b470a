"""The restricted reader of torch files: it reads what torch wrote, and runs nothing of it."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from openglm.checkpoints.layout import expected_shapes
from openglm.checkpoints.pickle_reader import Placeholder
from openglm.checkpoints.torch_file import StoredTensor, read_module, read_torch_file
from openglm.config import ModelConfig
from openglm.errors import CheckpointError

CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=8, inner_hidden_size=24, vocab_size=48)


def random_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_shapes(config).items()}


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


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
