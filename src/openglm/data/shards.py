"""Token shards: one pair of memory-mapped arrays per source file, with counts and checksums.

    NAME.tokens   uint16 or uint32, documents one after the other, each closed by eos
    NAME.offsets  int64, where each document begins, and the end
    shards.json   for each shard: kind, language, documents, tokens, UTF-8 bytes, SHA-256; and of which tokenizer

An instruction is two documents in a row, prompt and answer, without eos. Two doors lead here: ``write_shards`` tokenizes
a corpus as it is, `prepare.py` cleans it first and adds a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from openglm.data.readers import find_files, find_templates, read_documents
from openglm.errors import DataError
from openglm.storage import atomic_write, sha256
from openglm.tokenizers import load_tokenizer

INDEX = "shards.json"


@dataclass(frozen=True)
class ShardInfo:
    """What ``shards.json`` says of one shard."""

    name: str
    kind: str
    """"text" or "instructions"."""
    language: str
    """"zh" if more than a third of the letters are Chinese, else "en"."""
    documents: int
    tokens: int
    bytes: int
    dtype: str
    sha256: str
    """Of the tokens."""
    offsets_sha256: str = ""
    """Of the offsets; empty in older folders."""


class Shard:
    """Documents of one source as token ids, memory-mapped."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        self.info = info
        path = folder / f"{info.name}.tokens"
        try:
            # An empty file cannot be mapped.
            self.tokens = np.memmap(path, dtype=info.dtype, mode="r") if info.tokens else np.empty(0, info.dtype)
            self.offsets = np.fromfile(folder / f"{info.name}.offsets", dtype=np.int64)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the token shard `{path}`: {error}", path=path) from error
        for file, what, found, expected in (
            (path, "tokens", len(self.tokens), info.tokens),
            (path.with_name(f"{info.name}.offsets"), "offsets", len(self.offsets), info.documents + 1),
        ):
            if found != expected:
                raise DataError(f"`{file}` holds {found} {what}, not {expected}", hint="prepare the data again", path=file)
        if self.offsets[0] != 0 or self.offsets[-1] != info.tokens:
            raise _damaged(folder / f"{info.name}.offsets")

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, as stored."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def verify(self, folder: str | Path) -> None:
        """Read the shard and compare it with its checksums. Raises ``DataError`` naming the file that is damaged."""
        folder, info = Path(folder), self.info
        for name, expected in ((f"{info.name}.tokens", info.sha256), (f"{info.name}.offsets", info.offsets_sha256)):
            if expected and sha256(folder / name) != expected:
                raise _damaged(folder / name)
        if (np.diff(self.offsets) < 0).any():
            raise _damaged(folder / f"{info.name}.offsets")


def _damaged(path: Path) -> DataError:
    return DataError(f"`{path}` is damaged: it is not what was written", hint="prepare the data again", path=path)


def shard_name(path: Path) -> str:
    """The name of a source: the file's name without its suffixes."""
    return path.name.split(".")[0]


def _chinese_share(text: str) -> float:
    letters = sum(c.isalpha() for c in text)
    return sum("\u4e00" <= c <= "\u9fff" for c in text) / max(letters, 1)


def _write_shard(path: Path, folder: Path, tokenizer_path: Path) -> ShardInfo:
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    eos = tokenizer.special_tokens["eos"]
    name, offsets, size, chinese = shard_name(path), [0], 0, []
    kinds: set[str] = set()
    with atomic_write(folder / f"{name}.tokens") as file:
        for number, document in enumerate(read_documents([path])):
            parts = [tokenizer.encode(document.text)]
            kinds.add("text" if document.answer is None else "instructions")
            if len(kinds) > 1:
                raise DataError(f"`{path}` mixes instructions and running text", hint="put them into separate files", path=path)
            if document.answer is None:
                parts[0].append(eos)
            else:
                parts.append(tokenizer.encode(document.answer))
            for part in parts:
                file.write(np.asarray(part, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(part))
            size += len(document.text.encode()) + len((document.answer or "").encode())
            if number % 25 == 0:
                chinese.append(_chinese_share(document.text[:2000]))
    with atomic_write(folder / f"{name}.offsets") as file:
        file.write(np.asarray(offsets, dtype=np.int64).tobytes())
    language = "zh" if chinese and sum(chinese) / len(chinese) > 1 / 3 else "en"
    sums = [sha256(folder / f"{name}.{part}") for part in ("tokens", "offsets")]
    kind = next(iter(kinds), "text")
    return ShardInfo(name, kind, language, len(offsets) - 1, offsets[-1], size, np.dtype(dtype).name, *sums)


def write_shards(
    paths: Iterable[str | Path],
    folder: str | Path,
    tokenizer: str | Path,
    *,
    workers: int = 2,
    log: Callable[[str], None] | None = None,
) -> list[ShardInfo]:
    """Tokenize files on several cores, one shard each. ``shards.json`` is written last, so a folder with it is whole.

    Raises ``DataError`` for text that cannot be read and for two files of one name, ``ConfigError`` for templates that
    cannot be used.
    """
    folder = Path(folder)
    files = sorted(find_files(paths), key=lambda path: -path.stat().st_size)
    names = [shard_name(path) for path in files]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two files are called `{name}`", hint="rename one: shards are named after their file")
    templates = _templates(files)
    infos: list[ShardInfo] = []
    # spawn: forking a process that has used torch's threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for info in pool.map(_write_shard, files, [folder] * len(files), [Path(tokenizer)] * len(files)):
            infos.append(info)
            if log:
                log(f"{info.name}: {info.documents:,} documents, {info.tokens:,} tokens ({info.language})")
    infos.sort(key=lambda info: info.name)
    write_index(folder, infos, tokenizer, _sources(files), templates)
    return infos


def write_index(
    folder: Path,
    infos: Iterable[ShardInfo],
    tokenizer: str | Path,
    sources: dict[str, int],
    templates: dict[str, str] | None = None,
) -> None:
    """Write ``shards.json``, after which the folder is whole.

    ``sources``: size of each file they were made from; ``templates``: digest of the templates of those that have any.
    """
    with atomic_write(folder / INDEX, "w") as file:
        index = {"tokenizer_sha256": sha256(tokenizer), "sources": sources, "templates": templates or {}}
        json.dump({**index, "shards": [asdict(info) for info in infos]}, file, indent=1)


def _sources(files: Iterable[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(files)}


def _templates(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: templates.digest for path, templates in sorted(find_templates(files).items())}


def check_sources(paths: Iterable[str | Path], folder: str | Path) -> None:
    """Raise ``DataError`` if the files have other names, sizes or templates than those the folder's shards were made from."""
    index, files = _read_index(Path(folder))[0], find_files(paths)
    if index.get("sources") is None:  # an older folder does not say
        return
    text = index["sources"] != _sources(files)
    if text or index.get("templates", {}) != _templates(files):
        raise DataError(
            f"the {'training text has' if text else 'templates have'} changed since the shards in `{folder}` were made",
            hint="remove that folder to tokenize it again, or give another --out",
            path=folder,
        )


def open_shards(folder: str | Path, tokenizer: str | Path | None = None) -> list[Shard]:
    """All shards of a folder. With ``tokenizer``, raises ``DataError`` if they were made by another one."""
    folder = Path(folder)
    index, infos = _read_index(folder)
    if tokenizer is not None and index.get("tokenizer_sha256") != sha256(tokenizer):
        raise DataError(
            f"the shards in `{folder}` were made by another tokenizer than `{tokenizer}`",
            hint="prepare the data again",
            path=folder,
        )
    return [Shard(folder, info) for info in infos]


def digest(shards: Iterable[Shard]) -> str:
    """16 hexadecimal digits that stand for what the shards hold, by their names and checksums."""
    sums = sorted((shard.info.name, shard.info.sha256, shard.info.offsets_sha256) for shard in shards)
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _read_index(folder: Path) -> tuple[dict[str, Any], list[ShardInfo]]:
    """``shards.json`` as it stands, and its shards."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        infos = [ShardInfo(**info) for info in index["shards"]]
        if not all(isinstance(number, int) and number >= 0 for i in infos for number in (i.documents, i.tokens)):
            raise ValueError(infos)
        if not all(i.dtype in ("uint16", "uint32") for i in infos):
            raise ValueError(infos)
    except OSError as error:
        raise DataError(f"`{folder}` holds no token shards (no {INDEX})", path=folder) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`{path}` is not an index of token shards", hint="remove that folder and make the shards again", path=path
        ) from error
    return index, infos
