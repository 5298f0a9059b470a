"""The house's own model format: a folder that is whole or absent, and that a program can check.

config.json                        the network (``ModelConfig``), format_version, dtype, tokenizer
model-00001-of-0000N.safetensors   the tensors, in the network's order and names
model.safetensors.index.json       which tensor lies in which shard
unigram.model, ...                 the tokenizer's files, where there is a tokenizer
checksums.json                     size and SHA-256 of every other file
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openglm.checkpoints.layout import DTYPES, Expected, dtype_name, expected_tensors, plain_name, resolve_dtype
from openglm.checkpoints.torch_file import StoredTensor
from openglm.config import ModelConfig
from openglm.errors import CheckpointError, StorageError
from openglm.storage import atomic_folder, sha256

FORMAT_VERSION = 1
CONFIG_FILE, INDEX_FILE, CHECKSUM_FILE = "config.json", "model.safetensors.index.json", "checksums.json"
DEFAULT_SHARD_BYTES = 2 << 30
_LFS_POINTER = b"version https://git-lfs"
_UNFINISHED = (".part", ".incomplete", ".crdownload", ".aria2", ".tmp")
_AGAIN = "download or copy this folder again"
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}


class SavableTokenizer(Protocol):
    """What is needed of a tokenizer to store it beside its model."""

    def save(self, folder: str | Path) -> list[str]:
        """Write the tokenizer's files into a folder and return their names, the main one first."""
        ...


class Checkpoint:
    """A model folder of our own format, opened: its tensors are memory-mapped when they are asked for.

    A mapped tensor is private (copy on write): it may be written to, the file never changes; and the file may be
    replaced or removed by ``save_checkpoint`` while tensors of it are in use. ``rows`` reads the file anew each time, and
    refuses one that is no longer the file that was opened.
    """

    def __init__(self, folder: Path, config: ModelConfig, shards: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.notes: list[str] = []
        #: Name of the stored precision, "float16".
        self.dtype: str = settings["dtype"]
        name = settings.get("tokenizer")
        #: The tokenizer's file, or None where the folder has none.
        self.tokenizer_path: Path | None = folder / name if name else None
        self._shards = shards
        self._open_files: dict[str, Any] = {}
        self._opened: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype, int]]] = {}

    def names(self) -> list[str]:
        """Names of the tensors, in the network's order."""
        return list(self._shards)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype, memory-mapped. Raises ``CheckpointError`` for a name that is not there."""
        if name not in self._shards:
            raise CheckpointError(f"`{self.folder}` has no tensor `{name}`", path=self.folder, key=name)
        path = self.folder / self._shards[name]
        try:
            return self._file(path).get_tensor(name)
        except SafetensorError as error:
            raise _damaged(path, error) from error

    def rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, or some columns of them, read into memory of their own, not mapped.

        Raises ``CheckpointError`` for a name that is not there, and for a file that has gone or changed since it was opened.
        """
        if name not in self._shards:
            raise CheckpointError(f"`{self.folder}` has no tensor `{name}`", path=self.folder, key=name)
        path = self.folder / self._shards[name]
        self._file(path)
        if _identity(path) != self._opened[path.name]:
            raise CheckpointError(f"`{path}` has changed since it was opened", hint="load the model again", path=path)
        if path.name not in self._places:
            self._places[path.name] = _read_header(path)
        shape, dtype, position = self._places[path.name][name]
        stored = StoredTensor(path, dtype, shape, torch.empty(shape, device="meta").stride(), position)
        return stored.read_rows(start, stop, columns)

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises ``CheckpointError`` naming the first damaged one."""
        for name, entry in _read_checksums(self.folder).items():
            _check_size(self.folder / name, entry["size"])
            if sha256(self.folder / name) != entry["sha256"]:
                raise CheckpointError(
                    f"`{self.folder / name}` is damaged: its checksum is not the one in {CHECKSUM_FILE}",
                    hint=_AGAIN,
                    path=self.folder / name,
                )

    def _file(self, path: Path) -> Any:
        if path.name not in self._open_files:
            self._opened[path.name] = _identity(path)  # which also tells a refusal; safetensors calls each "No such file"
            try:
                self._open_files[path.name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise _damaged(path, error) from error
        return self._open_files[path.name]

    def check_tensors(self) -> None:
        """Compare names, shapes and dtypes of the shards with the configuration; reads their headers only."""
        expected = expected_tensors(self.config)
        for name, (shape, dtype) in expected.items():
            if name not in self._shards:
                path = self.folder / INDEX_FILE
                raise CheckpointError(f"`{path}` lacks the tensor `{name}`", hint=_AGAIN, path=path, key=name)
            path = self.folder / self._shards[name]
            try:
                entry = self._file(path).get_slice(name)
            except SafetensorError as error:
                raise CheckpointError(f"`{path}` lacks the tensor `{name}`", hint=_AGAIN, path=path, key=name) from error
            check_shape(path, name, tuple(entry.get_shape()), shape)
            dtype = dtype or DTYPES[self.dtype]
            if entry.get_dtype() != _SAFETENSORS_NAMES[dtype]:
                raise CheckpointError(
                    f"`{path}`: `{name}` is stored as {entry.get_dtype()}, but {CONFIG_FILE} says {dtype_name(dtype)}",
                    path=path,
                    key=name,
                )
        for name in self._shards:
            if name not in expected:
                path = self.folder / INDEX_FILE
                raise CheckpointError(
                    f"`{path}` names the tensor `{name}`, which this model does not have", path=path, key=name
                )


def _identity(path: Path) -> tuple[int, ...]:
    """Numbers that are others for a file which was replaced or written to. Raises ``CheckpointError`` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
    """Name to shape, dtype and first byte of the tensors of a shard."""
    dtypes = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return {
            name: (tuple(entry["shape"]), dtypes[entry["dtype"]], 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def check_shape(path: Path | None, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ``CheckpointError`` naming file and tensor if a shape is not the expected one."""
    if found != expected:
        where = f"`{path}`: " if path is not None else ""
        hint = "the vocabulary of the file does not fit `vocab_size`" if name == "word_embeddings.weight" else None
        raise CheckpointError(
            f"{where}`{name}` has the shape {list(found)}, expected {list(expected)}", hint=hint, path=path, key=name
        )


def check_tensor(name: str, tensor: Tensor, expected: Expected, rows: tuple[int, int] | None = None) -> None:
    """Raise ``CheckpointError`` naming a tensor, or some rows of it, of another shape or kind than expected."""
    shape = expected.shape if rows is None else (rows[1] - rows[0], *expected.shape[1:])
    check_shape(None, name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point() if expected.dtype is None else tensor.dtype != expected.dtype:
        wanted = "floating point" if expected.dtype is None else dtype_name(expected.dtype)
        raise CheckpointError(f"`{name}` is {dtype_name(tensor.dtype)}, expected {wanted}", key=name)


def open_checkpoint(folder: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Open a folder of our own format and check it without reading the weights: files, sizes, names, shapes.

    ``config`` replaces the folder's own. Raises ``CheckpointError`` that names the missing, unfinished, truncated or
    foreign file, and ``ConfigError`` for an impossible config.json.
    """
    folder = Path(folder)
    settings = read_json(folder / CONFIG_FILE)
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"`{folder / CONFIG_FILE}` has format_version {version!r}, this version of openglm reads {FORMAT_VERSION}",
            hint="update openglm" if isinstance(version, int) and version > FORMAT_VERSION else None,
            path=folder / CONFIG_FILE,
            key="format_version",
        )
    if settings.get("dtype") not in DTYPES:
        raise CheckpointError(
            f"`{folder / CONFIG_FILE}` has dtype {settings.get('dtype')!r}, expected one of {', '.join(DTYPES)}",
            path=folder / CONFIG_FILE,
            key="dtype",
        )
    config = config or ModelConfig.from_json(folder / CONFIG_FILE)
    checksums = _read_checksums(folder)
    for name, entry in checksums.items():
        # Only sizes: cheap, and a broken download nearly always has another one. A person may edit config.json.
        _check_size(folder / name, entry["size"] if name != CONFIG_FILE else None)
    shards = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(f"`{folder / INDEX_FILE}` has no `weight_map`", hint=_AGAIN, path=folder / INDEX_FILE)
    tokenizer = settings.get("tokenizer")
    for name in {*shards.values(), *([tokenizer] if tokenizer else [])}:
        if not isinstance(name, str) or name not in checksums:
            raise CheckpointError(f"`{folder / CHECKSUM_FILE}` does not know the file `{name}`", hint=_AGAIN, path=folder)
    checkpoint = Checkpoint(folder, config, shards, settings)
    checkpoint.check_tensors()
    return checkpoint


def save_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | tuple[str, int, Tensor]],
    *,
    tokenizer: SavableTokenizer | str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write a model folder; it appears whole under its name, or not at all.

    ``tensors`` may come one by one and in any order (with or without ``transformer.``), large ones in slices of their rows
    (name, first row, rows): each goes to its place in its shard at once, so memory holds one of them. ``dtype`` None keeps
    that of the first tensor. ``tokenizer``: a
    tokenizer, or the path of its file. ``replace`` swaps out an older checkpoint.

    Raises ``CheckpointError`` for a missing, unknown or misshaped tensor, or a value outside float16, and
    ``StorageError`` for a full disk or a folder that may not be replaced.
    """
    folder = Path(folder)
    if replace:
        _refuse_replacing_other_things(folder)
    pairs: Iterator[Any] = iter(tensors.items()) if isinstance(tensors, Mapping) else iter(tensors)
    with atomic_folder(folder, replace=replace) as part:
        stored = _write_tensors(part, config, pairs, resolve_dtype(dtype) if dtype is not None else None, max_shard_bytes)
        settings = {"format_version": FORMAT_VERSION, "dtype": dtype_name(stored), **config.to_dict()}
        if tokenizer is not None:
            settings["tokenizer"] = _save_tokenizer(part, tokenizer)
        _write_json(part / CONFIG_FILE, settings)
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(part.iterdir())}
        _write_json(part / CHECKSUM_FILE, {"files": files})


def _write_tensors(
    folder: Path, config: ModelConfig, pairs: Iterator[Any], dtype: torch.dtype | None, max_shard_bytes: int
) -> torch.dtype:
    """Lay out the shards from the shapes alone, then put every tensor where it belongs. Returns the stored dtype."""
    expected = expected_tensors(config)
    places: dict[str, tuple[IO[bytes], int]] = {}
    rows_of: dict[str, int] = dict.fromkeys(expected, 0)  # that have come
    waiting: list[tuple[str, int, Tensor]] = []
    files: list[IO[bytes]] = []
    try:
        for given, *start, tensor in pairs:
            name, first = plain_name(given), start[0] if start else 0
            whole = expected[name].shape[0] if name in expected else 0
            last = first + len(tensor) if start else whole
            if name not in expected or last > whole or rows_of[name] + last - first > whole:
                raise CheckpointError(
                    f"the tensor `{name}` is given twice" if name in expected else f"this model has no tensor `{name}`",
                    key=name,
                )
            check_tensor(name, tensor, expected[name], (first, last))
            rows_of[name] += last - first
            waiting.append((name, first, tensor))
            if not places:
                if dtype is None and expected[name].dtype is None:
                    dtype = resolve_dtype(tensor.dtype)
                if dtype is None:  # codes say nothing of the other tensors' type
                    continue
                places = _lay_out_shards(folder, expected, dtype, max_shard_bytes, files)
            for each, row, own in waiting:
                file, position = places[each]
                stored = _stored(each, own, expected[each].dtype or dtype)  # pyright: ignore[reportArgumentType]
                file.seek(position + row * (stored.nbytes // max(len(stored), 1)))
                file.write(stored.view(-1).view(torch.uint8).numpy().data)
            waiting.clear()
    finally:
        for file in files:
            file.close()
    missing = [name for name, own in expected.items() if rows_of[name] < own.shape[0]]
    if missing or dtype is None:
        raise CheckpointError(f"the tensor `{missing[0]}` is missing", key=missing[0])
    return dtype


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 != tensor.dtype and bool((stored.isinf() & tensor.detach().cpu().isfinite()).any()):
        raise CheckpointError(
            f"`{name}` has values beyond 65504, which float16 cannot hold", hint="use the dtype bfloat16 or float32", key=name
        )
    return stored


def _lay_out_shards(
    folder: Path, expected: Mapping[str, Expected], dtype: torch.dtype, max_shard_bytes: int, files: list[IO[bytes]]
) -> dict[str, tuple[IO[bytes], int]]:
    """Create the shards with their headers, and the index. Returns for each tensor its file and first byte.

    A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON, padded with blanks), and
    the tensors' bytes.
    """
    dtypes = {name: own.dtype or dtype for name, own in expected.items()}
    sizes = {name: torch.Size(own.shape).numel() * dtypes[name].itemsize for name, own in expected.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    places: dict[str, tuple[IO[bytes], int]] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            kind = _SAFETENSORS_NAMES[dtypes[name]]
            header[name] = {"dtype": kind, "shape": list(expected[name].shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(len(encoded) + 8) % 64)  # so that the tensors begin at a multiple of 64
        file = open(folder / shard, "wb")  # noqa: SIM115 (the caller closes it)
        files.append(file)
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            places[name] = (file, 8 + len(encoded) + header[name]["data_offsets"][0])
            weight_map[name] = shard
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return places


def _save_tokenizer(folder: Path, tokenizer: SavableTokenizer | str | Path) -> str:
    if not isinstance(tokenizer, str | Path):
        return tokenizer.save(folder)[0]
    path = Path(tokenizer)
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer file `{path}`", path=path)
    shutil.copyfile(path, folder / path.name)
    return path.name


def _refuse_replacing_other_things(folder: Path) -> None:
    """A folder is only swapped out if everything in it belongs to a checkpoint."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    known: set[str] = set()
    if (folder / CHECKSUM_FILE).is_file():
        known = {CHECKSUM_FILE, *_read_checksums(folder)}
    others = [folder.name] if not folder.is_dir() else sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        raise StorageError(
            f"`{folder}` is not replaced, because `{others[0]}` is no part of a checkpoint",
            hint="choose another folder or remove it",
            path=folder,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises ``CheckpointError`` that names the file."""
    _check_size(path, None)
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is damaged: {error}", hint=_AGAIN, path=path) from error
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUM_FILE
    files = read_json(path).get("files")
    good = isinstance(files, dict) and all(
        re.fullmatch(r"[^/\\\0]+", name)
        and name not in (".", "..")
        and isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    )
    if not good or files is None:
        raise CheckpointError(f"`{path}` is damaged: it lists no files with size and sha256", hint=_AGAIN, path=path)
    return files


def _check_size(path: Path, size: int | None) -> None:
    """The file is there, finished and of the given size (None: any)."""
    try:
        found = path.stat().st_size
        head = b""
        if found != size and path.is_file():
            with open(path, "rb") as file:
                head = file.read(len(_LFS_POINTER))
    except FileNotFoundError as error:
        unfinished = [path.name + end for end in _UNFINISHED if path.with_name(path.name + end).exists()]
        if unfinished:
            message = f"`{path}` is not there, only the unfinished `{unfinished[0]}`"
            raise CheckpointError(message, hint="finish the download", path=path) from error
        raise CheckpointError(f"`{path}` is missing", hint=_AGAIN, path=path) from error
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    if head == _LFS_POINTER:
        raise CheckpointError(f"`{path}` is a git-LFS pointer, not the file itself", hint="run `git lfs pull`", path=path)
    if size is not None and found != size:
        raise CheckpointError(f"`{path}` has {found:,} bytes, expected {size:,}", hint=_AGAIN, path=path)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"`{path}` is not a whole safetensors file: {error}", hint=_AGAIN, path=path)
