"""Which documents are there twice: exactly, or nearly.

Exact: a hash of the text without regard to case, width and blanks. Near: MinHash (Broder 1997) of shingles, 5 words or 8
Chinese characters, and locality-sensitive hashing in bands. Signatures are made by `rensa`, 350 times as fast as numpy
here; the comparison is 60 lines of numpy instead of a library, because it must keep the *first* document of a given
order, and because signatures of 256 bytes are all it holds in memory.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from openglm.data.ngrams import Units, ngrams
from openglm.data.readers import missing

SHINGLE_WORDS = 5
SHINGLE_HAN = 8
PERMUTATIONS = 128
BANDS = 16
"""16 bands of 8 rows: a pair of Jaccard similarity 0.7 is compared with a probability of 61 %, 0.8: 95 %, 0.9: 99.99 %."""
_SEED = 1
#: Kept documents that a new one is compared with in one band's bucket; more of them are alike only in boilerplate.
_BUCKET = 16


def fingerprint(text: str) -> bytes:
    """16 bytes that texts have in common which differ only in case, full-width forms and blanks."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingles(units: Units) -> np.ndarray:
    """uint64: hashes of all shingles, with repetitions; empty if the text is shorter than one."""
    return ngrams(units.hashes, SHINGLE_HAN if units.is_han else SHINGLE_WORDS)


def signatures(documents: Sequence[np.ndarray]) -> np.ndarray:
    """uint16 ``[documents, 128]``: MinHash signatures of sets of shingles (the low half of each 32-bit minimum).

    Two documents agree in a share of the columns that estimates their Jaccard similarity with a standard deviation of
    at most 0.044. Raises ``DataError`` if rensa is not installed.
    """
    if not documents:
        return np.zeros((0, PERMUTATIONS), np.uint16)
    try:
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise missing("rensa") from error
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(documents), offsets, PERMUTATIONS, _SEED)
    return (np.asarray(rows.to_rows(), dtype=np.uint32) & np.uint32(0xFFFF)).astype(np.uint16)


def similarity(first: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of one signature ``[128]`` to each of ``[n, 128]``."""
    return (others == first).mean(axis=1)


def exact_duplicates(fingerprints: np.ndarray) -> np.ndarray:
    """int64 ``[n]``: the first document with the same fingerprint, -1 where it is the document itself.

    ``fingerprints``: uint64 ``[n, 2]``.
    """
    count = len(fingerprints)
    original = np.full(count, -1, np.int64)
    if count:
        order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0]))  # stable: equal ones stay in order
        ordered = fingerprints[order]
        begins = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
        first = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
        original[order] = np.where(begins, -1, first)
    return original


def near_duplicates(signatures: np.ndarray, eligible: np.ndarray, threshold: float) -> np.ndarray:
    """int64 ``[n]``: the most similar kept document that came earlier, -1 if the document is kept.

    ``signatures``: uint16 ``[n, 128]``; ``eligible``: bool ``[n]``, documents to compare; ``threshold``: least
    similarity of a near duplicate. A document is compared with kept ones only, so a chain of small changes does not
    drop its far end.
    """
    original = np.full(len(signatures), -1, np.int64)
    places = np.flatnonzero(eligible)
    if len(places) < 2:
        return original
    compared = signatures[places]
    crowded = np.zeros((len(places), BANDS), bool)
    for band in range(BANDS):
        keys = _band(compared, band)
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        crowded[order[1:][same], band] = True
        crowded[order[:-1][same], band] = True
    # From here on only documents that share a band with another one: a small part of any corpus worth having.
    candidates = np.flatnonzero(crowded.any(axis=1))
    keys = np.stack([_band(compared[candidates], band) for band in range(BANDS)], axis=1)
    buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
    for place, row, bands in zip(candidates.tolist(), keys.tolist(), crowded[candidates].tolist(), strict=True):
        found = sorted({k for band in range(BANDS) if bands[band] for k in buckets[band].get(row[band], ())})
        if found:
            alike = similarity(compared[place], compared[found])
            best = int(alike.argmax())
            if alike[best] >= threshold:
                original[places[place]] = places[found[best]]
                continue
        for band in range(BANDS):
            if bands[band]:
                bucket = buckets[band].setdefault(row[band], [])
                if len(bucket) < _BUCKET:
                    bucket.append(place)
    return original


def _band(signatures: np.ndarray, band: int) -> np.ndarray:
    """uint64 ``[n]``: a hash of the eight rows of a band."""
    width = PERMUTATIONS // BANDS
    halves = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]).view(np.uint64)
    return halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) + halves[:, 1]
