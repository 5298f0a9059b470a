"""The last step of a preparation: which documents are left, their shards, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openglm.data import duplicates
from openglm.data.decontamination import find_passage, open_index
from openglm.data.inputs import Input
from openglm.data.language import LANGUAGES
from openglm.data.pieces import SAMPLE_CHARACTERS, SAMPLES, Work, mixed, read_piece
from openglm.data.report import write_report
from openglm.data.shards import ShardInfo, write_index
from openglm.errors import DataError
from openglm.storage import atomic_write, sha256
from openglm.tokenizers import Tokenizer, load_tokenizer

KEPT, DUPLICATE, NEAR_DUPLICATE, IN_VALIDATION = range(4)
REASONS = {DUPLICATE: "duplicate", NEAR_DUPLICATE: "near_duplicate", IN_VALIDATION: "in_validation"}
#: A language of a source gets its own shard if it has at least this share of its bytes; smaller ones go with the largest.
OWN_SHARD = 0.05


@dataclass
class _Piece:
    """A finished piece: the small arrays of its documents, and where they stand among all documents."""

    path: Path
    source: str
    is_validation: bool
    meta: dict[str, Any]
    bytes: np.ndarray
    languages: np.ndarray
    tokens: np.ndarray
    """int64 ``[documents]``"""
    lengths: np.ndarray
    """int64 ``[documents * parts]``"""
    first: int
    reasons: np.ndarray
    """uint8 ``[documents]``: ``KEPT``, or why not."""

    @property
    def parts(self) -> int:
        """Stretches of tokens a document: 2 for an instruction."""
        return 2 if self.meta["kinds"] == ["instructions"] else 1


def assemble(inputs: list[Input], names: list[list[str]], out: Path, work: Work, evaluation: Path | None) -> dict[str, Any]:
    """Write the shards of what is left, the tokenizer, the report, and ``shards.json`` last; returns the report.

    ``names``: file names of the pieces of each input; ``evaluation``: the folder that was decontaminated against, read
    again for the samples of the report. If no document is left, nothing is written.
    """
    tokenizer = load_tokenizer(work.tokenizer)
    pieces = list(_open_pieces(inputs, names, work))
    original = _mark_duplicates(pieces, work)
    sources: dict[str, list[_Piece]] = {}
    for piece in pieces:
        sources.setdefault(piece.source, []).append(piece)
    for source, own in sources.items():
        if len({kind for piece in own for kind in piece.meta["kinds"]}) > 1:
            raise mixed(Path(source))
    planned = [(name, own, languages) for source, own in sources.items() for name, languages in _shards_of(source, own)]
    for name, count in Counter(name for name, _, _ in planned).items():
        if count > 1:
            raise DataError(f"two shards would be called `{name}`", hint="rename a file: shards are named after them")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    infos = [_write_shard(out, name, own, languages, dtype) for name, own, languages in planned]
    samples = [sample for source, own in sources.items() for sample in _dropped_samples(source, own)]
    index = open_index(work.index) if work.index is not None else None
    if evaluation is not None:
        for sample in samples:
            if "file" in sample:
                sample["evaluation"] = find_passage(evaluation, sample["file"], sample["record"], sample["passage"])
    report = {
        "format": 1,
        "shards": [asdict(info) for info in infos],
        "sources": [_describe(source, own) for source, own in sources.items()],
        "evaluation": {k: v for k, v in index.meta.items() if k != "files"} if index is not None else None,
        "dropped_samples": samples + _duplicate_samples(pieces, original, tokenizer),
    }
    if infos:
        tokenizer.save(out)
        write_report(out, report)
        files = {path.name: path.stat().st_size for each in inputs for path in each.paths}
        write_index(out, sorted(infos, key=lambda info: info.name), work.tokenizer, files)
    return report


def _open_pieces(inputs: list[Input], names: list[list[str]], work: Work) -> Iterator[_Piece]:
    first = 0
    for each, own in zip(inputs, names, strict=True):
        for name in own:
            path = work.pieces / name
            meta, sizes, languages, lengths = read_piece(path, "meta", "bytes", "languages", "lengths")
            tokens = lengths.reshape(len(sizes), -1).sum(axis=1) if len(sizes) else np.zeros(0, np.int64)
            reasons = np.zeros(len(sizes), np.uint8)
            yield _Piece(path, each.source, each.is_validation, meta, sizes, languages, tokens, lengths, first, reasons)
            first += len(sizes)


def _mark_duplicates(pieces: list[_Piece], work: Work) -> np.ndarray:
    """Fill in the reasons of the pieces; returns int64 ``[documents]``: the document that each one repeats, or -1."""
    count = sum(len(piece.bytes) for piece in pieces)
    if not work.options.deduplicate or not count:
        return np.full(count, -1, np.int64)
    prints = np.zeros((count, 2), np.uint64)
    signatures = np.zeros((count if work.options.similarity < 1 else 0, duplicates.PERMUTATIONS), np.uint16)
    eligible = np.zeros(count, bool)
    validation = np.zeros(count, bool)
    for piece in pieces:
        found, signed, can = read_piece(piece.path, "fingerprints", "signatures", "eligible")
        own = slice(piece.first, piece.first + len(found))
        prints[own], eligible[own], validation[own] = found, can, piece.is_validation
        if len(signatures):
            signatures[own][can] = signed
    original = duplicates.exact_duplicates(prints)
    reasons = np.where(original >= 0, DUPLICATE, KEPT).astype(np.uint8)
    if len(signatures):
        near = duplicates.near_duplicates(signatures, eligible & (original < 0), work.options.similarity)
        reasons[near >= 0] = NEAR_DUPLICATE
        original = np.where(near >= 0, near, original)
    # Validation comes first in the order, so a training document that repeats one of its documents is what goes.
    reasons[(original >= 0) & validation[original] & ~validation] = IN_VALIDATION
    for piece in pieces:
        piece.reasons = reasons[piece.first : piece.first + len(piece.bytes)]
    return original


def _shards_of(source: str, pieces: list[_Piece]) -> list[tuple[str, list[int]]]:
    """Names of the shards of a source and the languages in each: one shard, or one a language that is no exception."""
    sizes = np.zeros(len(LANGUAGES), np.int64)
    for piece in pieces:
        kept = piece.reasons == KEPT
        np.add.at(sizes, piece.languages[kept], piece.bytes[kept])
    if not sizes.sum():
        return []
    own = [code for code in range(len(LANGUAGES)) if sizes[code] >= OWN_SHARD * sizes.sum()]
    if len(own) == 1:
        return [(source, list(range(len(LANGUAGES))))]
    rest = [code for code in range(len(LANGUAGES)) if code not in own]
    largest = int(sizes.argmax())
    return [(f"{source}-{LANGUAGES[code]}", [code, *(rest if code == largest else [])]) for code in own]


def _write_shard(out: Path, name: str, pieces: list[_Piece], languages: list[int], dtype: np.dtype) -> ShardInfo:
    offsets = [np.zeros(1, np.int64)]
    size, by_language = 0, np.zeros(len(LANGUAGES), np.int64)
    with atomic_write(out / f"{name}.tokens") as file:
        for piece in pieces:
            kept = (piece.reasons == KEPT) & np.isin(piece.languages, languages)
            if not kept.any():
                continue
            stretches = np.repeat(kept, piece.parts)
            (tokens,) = read_piece(piece.path, "tokens")
            file.write(np.ascontiguousarray(tokens[np.repeat(stretches, piece.lengths)]).astype(dtype).tobytes())
            offsets.append(offsets[-1][-1] + np.cumsum(piece.lengths[stretches]))
            size += int(piece.bytes[kept].sum())
            np.add.at(by_language, piece.languages[kept], piece.bytes[kept])
    ends = np.concatenate(offsets)
    with atomic_write(out / f"{name}.offsets") as file:
        file.write(ends.astype(np.int64).tobytes())
    language = LANGUAGES[int(by_language.argmax())]
    kind = next(kind for piece in pieces for kind in piece.meta["kinds"])
    sums = [sha256(out / f"{name}.{part}") for part in ("tokens", "offsets")]
    return ShardInfo(name, kind, language, len(ends) - 1, int(ends[-1]), size, dtype.name, *sums)


def _describe(source: str, pieces: list[_Piece]) -> dict[str, Any]:
    """What the report says of a source."""
    languages: dict[str, dict[str, int]] = {}
    dropped: dict[str, dict[str, int]] = {}
    read, cut = {"documents": 0, "bytes": 0}, {"documents": 0, "passages": 0}
    matches: dict[str, int] = {}

    for piece in pieces:
        _add(read, piece.meta["read"])
        _add(cut, piece.meta["cut"])
        _add(matches, piece.meta["matches"])
        for reason, counts in piece.meta["dropped"].items():
            _add(dropped.setdefault(reason, {}), counts)
        for code, reason in REASONS.items():
            mask = piece.reasons == code
            if mask.any():
                counts = {"documents": int(mask.sum()), "bytes": int(piece.bytes[mask].sum())}
                _add(dropped.setdefault(reason, {}), counts)
        for code, language in enumerate(LANGUAGES):
            mask = (piece.reasons == KEPT) & (piece.languages == code)
            if mask.any():
                values = {"documents": mask.sum(), "tokens": piece.tokens[mask].sum(), "bytes": piece.bytes[mask].sum()}
                _add(languages.setdefault(language, {}), {key: int(value) for key, value in values.items()})
    kept = {key: sum(row[key] for row in languages.values()) for key in ("documents", "tokens", "bytes")}
    return {
        "name": source,
        "kind": next((kind for piece in pieces for kind in piece.meta["kinds"]), "text"),
        "read": read,
        "kept": kept,
        "languages": dict(sorted(languages.items())),
        "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1]["documents"], item[0]))),
        "cut": cut,
        "matches": dict(sorted(matches.items(), key=lambda item: (-item[1], item[0]))),
    }


def _add(row: dict[str, int], counts: dict[str, int]) -> None:
    for key, count in counts.items():
        row[key] = row.get(key, 0) + count


def _dropped_samples(source: str, pieces: list[_Piece]) -> Iterator[dict[str, Any]]:
    """Of what the pieces dropped: a few of each reason, chosen by hash, so that they do not depend on the order."""
    reasons = sorted({reason for piece in pieces for reason in piece.meta["samples"]})
    for reason in reasons:
        found = [sample for piece in pieces for sample in piece.meta["samples"].get(reason, [])]
        for sample in sorted(found, key=lambda sample: (sample["digest"], sample["id"]))[:SAMPLES]:
            yield {"source": source, "reason": reason, **{k: v for k, v in sample.items() if k != "digest"}}


def _duplicate_samples(pieces: list[_Piece], original: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A few of each source's duplicates, beside what they repeat."""
    firsts = np.asarray([piece.first for piece in pieces] or [0])
    chosen: dict[tuple[str, int], list[int]] = {}
    for piece in pieces:
        for code in REASONS:
            own = chosen.setdefault((piece.source, code), [])
            own += (piece.first + np.flatnonzero(piece.reasons == code)).tolist()

    def look(document: int) -> dict[str, Any]:
        piece = pieces[int(np.searchsorted(firsts, document, side="right")) - 1]
        place = document - piece.first
        (tokens,) = read_piece(piece.path, "tokens")
        begin = int(piece.lengths[: place * piece.parts].sum())
        text = tokenizer.decode(tokens[begin : begin + int(piece.tokens[place])][:SAMPLE_CHARACTERS].tolist())
        return {"source": piece.source, "id": piece.meta["ids"][place], "text": text[:SAMPLE_CHARACTERS]}

    samples = []
    for (source, code), documents in chosen.items():
        # Spread over the source, the same ones each time.
        for document in documents[:: max(len(documents) // SAMPLES, 1)][:SAMPLES]:
            found, repeats = look(document), look(int(original[document]))
            samples.append({**found, "source": source, "reason": REASONS[code], "repeats": repeats})
    return samples
