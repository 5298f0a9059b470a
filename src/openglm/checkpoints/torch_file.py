"""Files that ``torch.save`` wrote, read without executing anything: the restricted reader of released weights.

Such a file is an uncompressed zip: ``<name>/data.pkl`` describes the object, ``<name>/data/<key>`` holds one storage
each. Opening reads the description only; a tensor is read from its place in the file when it is asked for, into
memory of its own. So a file of any size can be walked with one tensor in memory, and nothing depends on the file
afterwards.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openglm.checkpoints.pickle_reader import MalformedPickle, Named, Placeholder, read_pickle
from openglm.errors import CheckpointError

_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.CharStorage": torch.int8,
}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LFS_POINTER = b"version https://git-lfs"
#: Pickle of the magic number with which torch before 1.6 began its files.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MOST_DIMENSIONS = 8
_LARGEST_PICKLE = 256 << 20  # that of the released model is below 200 kB
_AGAIN = "download or copy this file again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: ``read`` brings it into memory."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    position: int
    """Byte at which its first element lies."""

    def read(self) -> torch.Tensor:
        """The tensor, contiguous, in memory of its own. Raises ``CheckpointError`` if the file has changed or gone."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._read_elements(span).as_strided(self.shape, self.stride).contiguous()

    def read_rows(self, start: int, stop: int, columns: range | None = None) -> torch.Tensor:
        """Some rows, or some columns of them, without reading the others where they lie one behind the other."""
        rows = torch.Size(self.shape[1:])
        contiguous = torch.empty(self.shape, dtype=self.dtype, device="meta").stride()
        if self.stride != contiguous:
            found = self.read()[start:stop]
            return (found if columns is None else found[:, columns.start : columns.stop]).clone()
        if columns is None or len(columns) == rows.numel():
            return self._read_elements((stop - start) * rows.numel(), start * rows.numel()).view(stop - start, *rows)
        firsts = range(start * rows.numel() + columns.start, stop * rows.numel() + columns.start, rows.numel())
        return self._read_pieces(len(columns), firsts).view(stop - start, len(columns))

    def read_first_row(self) -> torch.Tensor:
        """``[columns]``: row 0 of a contiguous matrix, without reading the others."""
        return self._read_elements(self.shape[-1])

    def _read_elements(self, count: int, first: int = 0) -> torch.Tensor:
        return self._read_pieces(count, [first])

    def _read_pieces(self, count: int, firsts: Sequence[int]) -> torch.Tensor:
        """``count`` elements from each of some places on, one behind the other."""
        size = count * self.dtype.itemsize
        buffer = torch.empty(len(firsts) * size, dtype=torch.uint8)
        pieces = buffer.numpy().data
        try:
            with open(self.path, "rb", buffering=0) as file:
                for number, first in enumerate(firsts):
                    view = pieces[number * size : (number + 1) * size]
                    file.seek(self.position + first * self.dtype.itemsize)
                    while view:
                        got = file.readinto(view)  # the system reads at most 2 GiB at a time
                        if not got:
                            raise CheckpointError(
                                f"`{self.path}` became shorter while it was read", hint=_AGAIN, path=self.path
                            )
                        view = view[got:]
        except OSError as error:
            raise CheckpointError(f"cannot read `{self.path}`: {error.strerror}", path=self.path) from error
        return buffer.view(self.dtype)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    position: int
    count: int


def read_torch_file(path: str | Path) -> Any:
    """The object of a ``torch.save`` file: plain values, ``StoredTensor`` for tensors, ``Placeholder`` for the rest.

    Tensors of float32, float16, bfloat16 and int8 are read; others become placeholders. Nothing of the file is
    executed or imported. Raises ``CheckpointError``, one sentence that names the file, for anything that is not
    a whole file of ``torch.save`` (zip form, torch 1.6 and later).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _refuse_foreign(path, file.read(64))
            archive = _Archive(path, file)
            return read_pickle(archive.pickle(), reduce=archive.reduce, persistent=archive.persistent)
    except MalformedPickle as error:
        raise CheckpointError(f"`{path}` is damaged or foreign: {error}", hint=_AGAIN, path=path) from error
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}", path=path) from error


def read_module(path: str | Path) -> dict[str, StoredTensor | Placeholder]:
    """Name to tensor under the key ``module`` (SPEC 4.2); other keys of the file are ignored.

    Raises ``CheckpointError`` if there is no such dictionary or a value in it is something else than a tensor.
    A tensor of a dtype that is not read here stays a ``Placeholder``.
    """
    path = Path(path)
    top = read_torch_file(path)
    module = top.get("module") if isinstance(top, dict) else None
    if not isinstance(module, dict):
        raise CheckpointError(
            f"`{path}` holds no dictionary of tensors under `module`", hint="it is no shard of a released model", path=path
        )
    for name, value in module.items():
        tensor_like = isinstance(value, StoredTensor) or (isinstance(value, Placeholder) and value.what in _KNOWN_ELSEWHERE)
        if not isinstance(name, str) or not tensor_like:
            what = f"an object of {_quote(value.what)}" if isinstance(value, Placeholder) else f"a {type(value).__name__}"
            key = name if isinstance(name, str) else repr(name)
            raise CheckpointError(f"`{path}` holds {what} where a tensor should be: {_quote(key)}", path=path, key=key)
    return module


#: Storages of dtypes that no weight has; buffers of training code may.
_KNOWN_ELSEWHERE = {f"torch.{kind}Storage" for kind in ("Double", "Long", "Int", "Short", "Byte", "Bool")}


def _quote(text: str) -> str:
    """A name out of the file, fit for one line of a message."""
    return f"`{text[:80] if text[:80].isprintable() else ascii(text[:80])}`"


def _refuse_foreign(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    if not head:
        raise CheckpointError(f"`{path}` is empty", hint=_AGAIN, path=path)
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(f"`{path}` is a git-LFS pointer, not the weights", hint="run `git lfs pull`", path=path)
    if _LEGACY_MAGIC in head:
        raise CheckpointError(
            f"`{path}` has the form that torch wrote before version 1.6",
            hint="load it with torch and save it again",
            path=path,
        )
    raise CheckpointError(f"`{path}` is not a file that torch.save wrote", hint=_AGAIN, path=path)


class _Archive:
    """The zip around a pickle: where its storages lie, and what the pickle's calls mean."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        try:
            members = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises a dozen kinds of errors for damaged files
            raise CheckpointError(
                f"`{path}` is cut off or damaged: its table of contents, at the end, cannot be read", hint=_AGAIN, path=path
            ) from error
        self.members = {member.filename: member for member in members}
        pickles = [name for name in self.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(self.members) != len(members):
            raise CheckpointError(f"`{path}` is a zip file, but torch.save did not write it", path=path)
        self.folder = pickles[0].removesuffix("data.pkl")
        if f"{self.folder}byteorder" in self.members and self.bytes_of(f"{self.folder}byteorder") != b"little":
            raise CheckpointError(f"`{path}` was written on a big-endian machine, which is not read", path=path)

    def place(self, name: str) -> tuple[int, int]:
        """First byte and size of a member, which must be stored as it is and lie inside the file."""
        member = self.members.get(name)
        if member is None:
            raise MalformedPickle(f"it lacks its part `{name}`")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
            raise MalformedPickle(f"its part `{name}` is compressed or encrypted, which torch.save never does")
        self.file.seek(member.header_offset)
        header = self.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise MalformedPickle(f"its part `{name}` is not where the table of contents says")
        name_length, extra_length = _LOCAL_HEADER.unpack(header)[-2:]
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + member.file_size > self.size:
            raise MalformedPickle(f"its part `{name}` reaches beyond the end of the file")
        return start, member.file_size

    def bytes_of(self, name: str) -> bytes:
        start, size = self.place(name)
        self.file.seek(start)
        return self.file.read(size)

    def pickle(self) -> bytes:
        name = f"{self.folder}data.pkl"
        if self.members[name].file_size > _LARGEST_PICKLE:
            raise MalformedPickle("its description is larger than that of any model")
        return self.bytes_of(name)

    def persistent(self, identity: Any) -> _Storage | Placeholder:
        """A storage: ("storage", type, key, location, number of elements)."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise MalformedPickle("it refers to something other than a storage")
        _, kind, key, _, count = identity
        if not isinstance(kind, Named) or not isinstance(key, str) or not _is_size(count):
            raise MalformedPickle("the description of a storage is damaged")
        dtype = _STORAGES.get(kind.name)
        if dtype is None:
            return Placeholder(kind.name)
        start, size = self.place(f"{self.folder}data/{key}")
        if count * dtype.itemsize != size:
            raise MalformedPickle(f"storage `{key}` has {size} bytes, expected {count} x {dtype.itemsize}")
        return _Storage(dtype, start, count)

    def reduce(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "collections.OrderedDict":
            if not arguments:
                return {}
        elif name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
            return self.tensor(*arguments[:4])
        elif name == "torch._utils._rebuild_parameter" and arguments and isinstance(arguments[0], StoredTensor | Placeholder):
            return arguments[0]
        return Placeholder(name)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor | Placeholder:
        if isinstance(storage, Placeholder):
            return storage
        sizes_fit = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= _MOST_DIMENSIONS
        if not isinstance(storage, _Storage) or not sizes_fit or not all(map(_is_size, (offset, *shape, *stride))):
            raise MalformedPickle("the description of a tensor is damaged")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        # Fewer elements in the storage than in the tensor: one element repeated (stride 0), and memory without bound.
        if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
            raise MalformedPickle(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.count}")
        position = storage.position + offset * storage.dtype.itemsize
        return StoredTensor(self.path, storage.dtype, shape, stride, position)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
