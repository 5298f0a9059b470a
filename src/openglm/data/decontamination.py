"""Passages of evaluation texts in training text: found by n-grams, and cut out.

As in GPT-3 (Brown et al. 2020, appendix C): a document that shares a run of 13 words with any evaluation text loses that
run and 200 characters on either side; remainders under 200 characters go, and a document that would fall into more than
ten pieces is dropped. Where we differ:

- In Chinese a run is 20 characters, about as much text as 13 words; 13 characters are one stock phrase of law or of the
  classical novels. A run counts as Chinese if more than half of its units are characters; margins are 60 characters.
- A run that more than ten records of the evaluation texts have in common is a prompt's template, and is not looked for.
- An instruction that shares a run is dropped whole.

Texts shorter than a run cannot be found this way; ``Index.meta`` says how many there were.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openglm.data.ngrams import Units, ngrams, split_units
from openglm.data.readers import open_stream, parquet_rows, row_groups
from openglm.errors import DataError
from openglm.storage import atomic_write

RUN_WORDS = 13
RUN_HAN = 20
MARGIN = {"zh": 60}
"""Characters that go on either side of a run, and the least that a remainder must have; 200 in any other language."""
_MARGIN = 200
MOST_PIECES = 10
TEMPLATE_RECORDS = 10
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".zst", ".gz")
#: Characters that are looked at together while an index is built.
_BATCH = 1 << 20


def find_texts(folder: str | Path) -> list[Path]:
    """All files below a folder that ``read_records`` can read, sorted. Raises ``DataError`` if there are none."""
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"there is no folder `{folder}` to decontaminate against", path=folder)
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    found = [path for path in paths if _kind(path) in SUFFIXES]
    if not found:
        raise DataError(
            f"`{folder}` holds no text to decontaminate against", hint=f"give {', '.join(SUFFIXES)}, plain, .zst or .gz"
        )
    return found


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    return suffixes[-1] if suffixes else ""


def read_records(path: Path) -> Iterator[list[str]]:
    """Every text of each record of a file: all strings of a JSON value or Parquet row, the cells of a CSV row.

    A text file is one record. In a JSON file the items of its list, or of the lists in its object, are records. Raises
    ``DataError`` for a damaged file.
    """
    kind = _kind(path)
    if kind == ".parquet":
        for group in range(row_groups(path, needs_text=False)):
            yield from (list(_strings(row)) for _, row in parquet_rows(path, group, columns=None))
        return
    with open_stream(path) as (file, _):
        if kind == ".jsonl":
            yield from _json_lines(file, path)
            return
        data = file.read()
    if kind == ".json":
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):  # many releases call JSON lines so
            yield from _json_lines(io.BytesIO(data), path)
            return
        for part in value.values() if isinstance(value, dict) else [value]:
            yield from (list(_strings(record)) for record in (part if isinstance(part, list) else [part]))
        return
    text = data.decode("utf-8-sig", "replace")
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(1 << 30)
        try:
            yield from csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
        except csv.Error as error:
            raise DataError(f"`{path}` is not valid {kind[1:].upper()}: {error}", path=path) from error
        return
    yield [text]


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield list(_strings(json.loads(line.decode("utf-8-sig"))))
            except (ValueError, RecursionError) as error:
                raise DataError(f"`{path}` line {number} is not valid JSON", path=path) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def runs(units: Units) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs of a text: hash (uint64), first unit (int64) and number of units (int64), each ``[runs]``."""
    found = []
    before = np.concatenate([[0], np.cumsum(units.han)])
    for length, wants_han in ((RUN_WORDS, False), (RUN_HAN, True)):
        hashes = ngrams(units.hashes, length)
        han = before[length:] - before[:-length] if len(hashes) else np.zeros(0, np.int64)
        places = np.flatnonzero((2 * han > length) == wants_han)
        found.append((hashes[places], places, np.full(len(places), length)))
    hashes, places, lengths = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return hashes, places, lengths


def _runs_of_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of many texts at once: hash, and number of the text. None reaches from one text into the next."""
    units = split_units("\n".join(texts))
    begins = np.cumsum([0] + [len(text) + 1 for text in texts])
    owner = np.searchsorted(begins, units.starts, side="right") - 1
    hashes, first, lengths = runs(units)
    whole = owner[first] == owner[first + lengths - 1]
    return hashes[whole], owner[first[whole]]


@dataclass(frozen=True)
class Match:
    """A passage of a document that occurs in an evaluation text."""

    start: int
    """First character; of consecutive runs, of the first one."""
    end: int
    record: int
    """Number of the evaluation record in the index."""


class Index:
    """The runs of a folder of evaluation texts, memory-mapped."""

    def __init__(self, hashes: np.ndarray, records: np.ndarray, filter_: np.ndarray, meta: dict[str, Any]) -> None:
        self.hashes, self.records, self.filter, self.meta = hashes, records, filter_, meta
        self._shift = np.uint64(64 - (8 * len(filter_)).bit_length() + 1)

    def where(self, record: int) -> tuple[str, int]:
        """File (as in ``meta``) and number, from 1, of a record."""
        firsts = [file["first_record"] for file in self.meta["files"]]
        file = int(np.searchsorted(firsts, record, side="right")) - 1
        return self.meta["files"][file]["name"], record - firsts[file] + 1

    def find(self, units: Units) -> list[Match]:
        """The passages of a text that occur in an evaluation text, in order; overlapping runs are joined."""
        hashes, first, lengths = runs(units)
        if not len(hashes) or not len(self.hashes):
            return []
        # One look at a bitmap instead of a binary search: nearly every run of clean text ends here.
        bits = hashes >> self._shift
        maybe = np.flatnonzero((self.filter[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8)) & 1)
        maybe = maybe[np.argsort(first[maybe], kind="stable")]
        places = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        matches: list[Match] = []
        for hit, place in zip(maybe.tolist(), places.tolist(), strict=True):
            if self.hashes[place] != hashes[hit]:
                continue
            start, end = int(units.starts[first[hit]]), int(units.ends[first[hit] + lengths[hit] - 1])
            if matches and start <= matches[-1].end:
                matches[-1] = Match(matches[-1].start, max(end, matches[-1].end), matches[-1].record)
            else:
                matches.append(Match(start, end, int(self.records[place])))
        return matches


def cut(text: str, matches: list[Match], language: str) -> list[str]:
    """What is left of a text without the matches and their surroundings; empty if nothing is worth keeping."""
    margin = MARGIN.get(language, _MARGIN)
    pieces, end = [], 0
    for match in matches:
        pieces.append(text[end : max(match.start - margin, end)])
        end = max(match.end + margin, end)
    pieces = [piece.strip() for piece in [*pieces, text[end:]]]
    kept = [piece for piece in pieces if len(piece) >= margin]
    return kept if len(kept) <= MOST_PIECES else []


def _batches(records: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Records together, so that numpy has something to do."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += sum(map(len, record))
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _without_repetitions(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    new = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))[: len(hashes)]
    return hashes[new], owners[new]


def build_index(folder: str | Path, target: Path) -> Index:
    """Read a folder of evaluation texts and write its index to the folder ``target``; ``index.json`` comes last."""
    root = Path(folder)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    files: list[dict[str, Any]] = []
    records = texts = searched = 0
    for path in find_texts(root):
        name = str(path.relative_to(root)) if path != root else path.name
        files.append({"name": name, "first_record": records, "records": 0, "bytes": path.stat().st_size})
        for batch in _batches(read_records(path)):
            strings = [text for record in batch for text in record]
            owners = np.repeat(np.arange(records, records + len(batch)), [len(record) for record in batch])
            hashes, text = _runs_of_texts(strings)
            searched += len(np.unique(text))
            texts += len(strings)
            records += len(batch)
            found.append(_without_repetitions(hashes, owners[text].astype(np.uint32)))
        files[-1]["records"] = records - files[-1]["first_record"]
    hashes = np.concatenate([part for part, _ in found] or [np.zeros(0, np.uint64)])
    where = np.concatenate([part for _, part in found] or [np.zeros(0, np.uint32)])
    order = np.argsort(hashes, kind="stable")
    hashes, begins, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    rare = counts <= TEMPLATE_RECORDS
    hashes, where = hashes[rare], where[order][begins[rare]]
    size = max((32 * len(hashes)).bit_length(), 10)
    bitmap = np.zeros(1 << (size - 3), np.uint8)
    bits = hashes >> np.uint64(64 - size)
    np.bitwise_or.at(bitmap, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))
    meta = {
        "files": files,
        "records": records,
        "runs": len(hashes),
        "templates": int((~rare).sum()),
        "texts": texts,
        "short_texts": texts - searched,
    }
    for name, array in (("hashes", hashes), ("records", where), ("filter", bitmap)):
        with atomic_write(target / f"{name}.npy") as file:
            np.save(file, array)
    with atomic_write(target / "index.json", "w") as file:
        json.dump(meta, file, ensure_ascii=False)
    return Index(hashes, where, bitmap, meta)


def open_index(target: Path) -> Index | None:
    """The index that ``build_index`` wrote, memory-mapped; None if it is not whole. Raises ``DataError`` if damaged."""
    if not (target / "index.json").is_file():
        return None
    try:
        meta = json.loads((target / "index.json").read_text(encoding="utf-8"))
        hashes, records, bitmap = (np.load(target / f"{name}.npy", mmap_mode="r") for name in ("hashes", "records", "filter"))
    except (OSError, ValueError) as error:
        raise DataError(f"the index in `{target}` is damaged: {error}", hint="give --fresh to begin anew") from error
    return Index(hashes, records, bitmap, meta)


def folder_state(folder: str | Path) -> list[list[Any]]:
    """Name and size of every file that is read, to notice a change."""
    root = Path(folder)
    return [[str(p.relative_to(root)) if p != root else p.name, p.stat().st_size] for p in find_texts(root)]


def find_passage(folder: str | Path, file: str, record: int, passage: str, around: int = 60) -> str:
    """The part of an evaluation record that a passage was found in, with some characters on either side."""
    path = Path(folder) if Path(folder).is_file() else Path(folder) / file
    wanted = runs(split_units(passage))[0]
    for text in next(itertools.islice(read_records(path), record - 1, None), []):
        units = split_units(text)
        hashes, first, lengths = runs(units)
        hits = np.flatnonzero(np.isin(hashes, wanted))
        if len(hits):
            start, end = units.starts[first[hits]].min(), units.ends[first[hits] + lengths[hits] - 1].max()
            return text[max(int(start) - around, 0) : int(end) + around]
    return ""
