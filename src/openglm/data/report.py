"""The report of a preparation, and what can be said of any folder of token shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from openglm.data.shards import INDEX, Shard, open_shards
from openglm.errors import DataError, TokenizerError
from openglm.storage import atomic_write
from openglm.tokenizers import FILE_NAMES, load_tokenizer

REPORT = "report.json"


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write ``report.json``."""
    with atomic_write(out / REPORT, "w") as file:
        json.dump(report, file, ensure_ascii=False, indent=1)


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a prepared folder; of shards without one, what their index says, with neither drops nor samples.

    Raises ``DataError`` for a folder without shards, and for one whose preparation is unfinished.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file() and (folder / "job.json").is_file():
        hint = "run the same `glm data prepare` again: it goes on where it stopped"
        raise DataError(f"the preparation of `{folder}` is unfinished", hint=hint, path=folder)
    infos = [shard.info for shard in open_shards(folder)]
    if not (folder / REPORT).is_file():
        sources = []
        for info in infos:
            kept = {
                "documents": info.documents // (2 if info.kind == "instructions" else 1),
                "tokens": info.tokens,
                "bytes": info.bytes,
            }
            rest = {"read": None, "dropped": {}, "cut": {"documents": 0, "passages": 0}, "matches": {}}
            sources.append({"name": info.name, "kind": info.kind, "kept": kept, "languages": {info.language: kept}, **rest})
        shards = [vars(info) for info in infos]
        return {"format": 1, "shards": shards, "sources": sources, "evaluation": None, "dropped_samples": []}
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if not isinstance(report["sources"], list):
            raise ValueError("no sources")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"`{folder / REPORT}` is not the report of a preparation", hint="prepare the data again") from error
    return report


def verify(folder: str | Path) -> int:
    """Compare every shard with its checksums; returns the bytes read. Raises ``DataError`` for the first damaged file."""
    folder = Path(folder)
    shards = open_shards(folder)
    for shard in shards:
        shard.verify(folder)
    return sum(shard.tokens.nbytes + shard.offsets.nbytes for shard in shards)


def kept_samples(folder: str | Path, count: int, source: str | None = None, characters: int = 300) -> list[dict[str, Any]]:
    """The beginnings of ``count`` documents of each shard, evenly spread; ``source``: only shards of that name.

    Raises ``DataError`` if the folder holds no such shard, or no tokenizer to read it with.
    """
    folder = Path(folder)
    shards = [shard for shard in open_shards(folder) if source is None or belongs(shard.info.name, source)]
    if not shards:
        names = ", ".join(shard.info.name for shard in open_shards(folder))
        raise DataError(f"`{folder}` holds no shard of a source `{source}`", hint=f"it holds: {names}")
    try:
        tokenizer = load_tokenizer(next(folder / name for name in FILE_NAMES if (folder / name).is_file()))
    except (StopIteration, TokenizerError) as error:
        hint = "copy the tokenizer that made the shards into it"
        raise DataError(f"`{folder}` holds no tokenizer to read its shards with", hint=hint, path=folder) from error

    def text(shard: Shard, index: int) -> str:
        return tokenizer.decode(shard.document(index)[:characters].tolist())[:characters]

    samples = []
    for shard in shards:
        parts = 2 if shard.info.kind == "instructions" else 1
        total = shard.info.documents // parts
        for index in np.unique(np.linspace(0, total - 1, num=min(count, total)).round().astype(int)).tolist():
            sample = {"shard": shard.info.name, "document": index, "text": text(shard, index * parts)}
            if parts == 2:
                sample["answer"] = text(shard, index * parts + 1)
            samples.append(sample)
    return samples


def belongs(shard: str, source: str) -> bool:
    """Whether a shard holds (a language of) a source."""
    return shard == source or shard.removeprefix(f"{source}-") in ("en", "zh", "other")
