"""What every tokenizer of the house offers, and decoding piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from openglm.errors import InputError

#: The words that stand for a blank in a user's text. They are split off before a tokenizer sees the text.
MASK_WORDS = ("[MASK]", "[gMASK]", "[sMASK]")


class StreamDecoder(Protocol):
    """Turns ids into text one at a time and never emits half a character."""

    def push(self, token: int) -> str:
        """Text that has become certain with this id; may be empty. Raises ``InputError`` as ``decode`` does."""
        ...

    def flush(self) -> str:
        """Whatever is left at the end (an incomplete character becomes U+FFFD)."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. A text is only text: no special token can be typed into it."""

    #: Name to id of the special tokens: "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "eos", "pad" at least.
    special_tokens: Mapping[str, int]
    #: Number of ids, special tokens included.
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises ``InputError`` if it holds lone surrogates (it came from invalid UTF-8)."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give nothing. Raises ``InputError`` for an id outside the vocabulary."""
        ...

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time; its pieces joined equal ``decode`` of all of them."""
        ...

    def save(self, folder: str | Path) -> list[str]:
        """Write the tokenizer's files into a folder and return their names."""
        ...


class ByteStream:
    """Stream decoder for tokenizers whose every id is a fixed run of UTF-8 bytes."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that has become certain with this id; may be empty. Raises ``InputError`` for an id of no vocabulary."""
        if not 0 <= token < len(self._table):
            raise InputError(f"id {token} is outside the vocabulary of {len(self._table)}")
        return self._decoder.decode(self._table[token])

    def flush(self) -> str:
        """Whatever is left at the end (an incomplete character becomes U+FFFD)."""
        return self._decoder.decode(b"", final=True)
