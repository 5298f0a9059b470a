"""Words and Chinese characters of a text as 64-bit hashes, and n-grams of them, without a loop in Python.

A *unit* is a run of letters and digits (a word), or one Chinese character, Japanese kana or Korean syllable. Case,
full-width forms, punctuation and blanks make no difference. Chinese carries in one character about what English carries
in 0.6 words, so n-grams are longer there.

The hashes depend on nothing but the text: no seed, no machine, no library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SYMBOL, WORD, HAN, OTHER_SYLLABLE = 0, 1, 2, 3
_PLANE = 1 << 16
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_BASE = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Units:
    """The units of a text; all arrays are ``[n]``."""

    hashes: np.ndarray
    """uint64"""
    starts: np.ndarray
    """int64: the character where each begins."""
    ends: np.ndarray
    """int64: the character behind it."""
    han: np.ndarray
    """bool: one character of Chinese (kana and Korean count as such), not a word."""

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def is_han(self) -> bool:
        """Whether at least half of the units are single characters."""
        return 2 * int(self.han.sum()) >= max(len(self), 1)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of every code point of the basic plane: its kind (uint8), and what it is folded to (uint32)."""
    kinds, folded = np.zeros(_PLANE, np.uint8), np.arange(_PLANE, dtype=np.uint32)
    for code in range(_PLANE):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        if 0xFF01 <= code <= 0xFF5E:  # full-width ASCII
            character = chr(code - 0xFEE0)
        if 0x3400 <= code <= 0x4DBF or 0x4E00 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF:
            kinds[code] = HAN
        elif 0x3041 <= code <= 0x30FF or 0xAC00 <= code <= 0xD7A3:
            kinds[code] = OTHER_SYLLABLE if character.isalpha() else SYMBOL
        elif character.isalnum():
            kinds[code] = WORD
        lower = character.lower()
        folded[code] = ord(lower) if len(lower) == 1 else code
    return kinds, folded


def code_points(text: str) -> np.ndarray:
    """uint32 ``[characters]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """uint8: ``SYMBOL``, ``WORD``, ``HAN`` or ``OTHER_SYLLABLE`` for each code point."""
    table, _ = _tables()
    kinds = table[np.minimum(codes, _PLANE - 1)]
    if len(codes) and codes.max() >= _PLANE:
        kinds[codes >= _PLANE] = SYMBOL
        kinds[(codes >= 0x20000) & (codes < 0x32000)] = HAN
    return kinds


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the input reaches every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def split_units(text: str) -> Units:
    """The units of ``text``, in order."""
    codes = code_points(text)
    kinds = kinds_of(codes)
    places = np.flatnonzero(kinds)
    if not len(places):
        empty = np.zeros(0, np.int64)
        return Units(empty.astype(np.uint64), empty, empty, empty.astype(bool))
    kinds = kinds[places]
    # A unit begins at every single character, and at a word character that does not go on from another one.
    begins = kinds != WORD
    begins[0] = True
    begins[1:] |= (kinds[:-1] != WORD) | (np.diff(places) > 1)
    first = np.flatnonzero(begins)
    _, folded = _tables()
    codes = codes[places]
    codes = np.where(codes < _PLANE, folded[np.minimum(codes, _PLANE - 1)], codes).astype(np.uint64)
    place_in_unit = np.arange(len(codes)) - first[np.cumsum(begins) - 1]
    hashes = np.add.reduceat(_mix(codes + place_in_unit.astype(np.uint64) * _ODD), first)
    last = np.append(first[1:], len(codes)) - 1
    return Units(_mix(hashes), places[first], places[last] + 1, kinds[first] != WORD)


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 ``[units - n + 1]``: a hash of every run of ``n`` units; empty if there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total = total * _BASE + hashes[k : k + count]
    return _mix(total)
