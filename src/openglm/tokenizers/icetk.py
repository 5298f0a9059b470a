"""The released tokenizer of GLM-130B: icetk's ``ice_text.model`` with the rows that GLM-130B adds (SPEC 7).

The file holds 130,000 SentencePiece pieces; a text id is the piece's index + 20,000. The 344 rows from 150,000 on (8
special tokens, the tab, runs of 2 to 80 blanks, 256 bytes) are appended in memory, never written to a file.

Two ways of the original:

- ``whitespace="keep"`` (SPEC 7.3, used for everything but the Pile): newlines, tabs and runs of blanks have ids of
  their own; characters without a piece are written as bytes. Golden variant ``glm130b``.
- ``whitespace="collapse"`` (SPEC 7.2, plain icetk, used for the Pile): every run of whitespace is one blank, characters
  without a piece become ``<unk>``. Golden variant ``icetk``. Collapsing with bytes instead (``glm130b_no_whitespace``)
  is ``encode(text, linebreaks=False, whitespaces=False)`` of the first way.

Either way the normaliser loses something: NFKC (full width becomes half width), blanks at the ends, control
characters; ``decode(encode(text)) == text`` only for text that NFKC leaves alone and that has no outer blanks.
``<n>``, ``<|tab|>`` and ``<|blank_k|>`` typed in a text are taken as the tokens, as in the original (SPEC 7.3).
"""

from __future__ import annotations

import hashlib
import operator
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece

from openglm.errors import InputError, TokenizerError
from openglm.storage import atomic_write

FILE_NAME = "ice_text.model"
SHA256 = "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"
WHITESPACE = ("keep", "collapse")

#: Ids below are image tokens: no text gives them, and they have no text (SPEC 7.1).
TEXT_OFFSET = 20_000
_RELEASED_PIECES = 130_000
_FIRST_PIECES = ["<unk>", "<s>", "</s>", "<pad>", "<n>"]

# The appended rows, in the order of their ids.
_SPECIAL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
_SPECIAL_NAMES = [piece.strip("<>") for piece in _SPECIAL_PIECES]
_TAB = "<|tab|>"
_LONGEST_BLANK = 80
_WHITESPACE_PIECES = {_TAB: "\t"} | {f"<|blank_{k}|>": " " * k for k in range(2, _LONGEST_BLANK + 1)}
_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_APPENDED_PIECES = [*_SPECIAL_PIECES, *_WHITESPACE_PIECES, *_BYTE_PIECES]
_FIRST_WHITESPACE = len(_SPECIAL_PIECES)
_FIRST_BYTE = _FIRST_WHITESPACE + len(_WHITESPACE_PIECES)

_META = "\u2581"
_UNKNOWN_TEXT = " \u2047 "  # what SentencePiece writes for <unk>
_BLANKS = re.compile(f" {{2,{_LONGEST_BLANK}}}")
_IMAGE = re.compile(r"<image_(0|[1-9]\d{0,3}|1\d{4})>")
_SURROGATE = re.compile("[\ud800-\udfff]")

# Piece types and field numbers of SentencePiece's ModelProto.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


class IcetkTokenizer:
    """GLM-130B's tokenizer, read from ``ice_text.model`` (the file or its folder). See ``Tokenizer`` for the methods.

    ``vocab_size`` is 150,344 (SPEC 7.1; the network's embedding has 150,528 rows, the rest is padding). ``released``
    demands the released file, by its checksum; without it any SentencePiece file that begins with the same five
    pieces does, and the appended rows follow its last piece. Raises ``TokenizerError`` for another file.
    """

    def __init__(self, path: str | Path, whitespace: str = "keep", *, released: bool = True) -> None:
        if whitespace not in WHITESPACE:
            raise InputError(f"`whitespace` may be {' or '.join(WHITESPACE)}, not {whitespace!r}")
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            self._model = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer `{path}`: {error.strerror}", path=path) from error
        self.path = path
        self.whitespace = whitespace
        base = _checked(self._model, path, released)
        self._keep = whitespace == "keep"
        self._processor = _processor(self._model + _appended(_CONTROL)) if self._keep else base
        self._special_processor: sentencepiece.SentencePieceProcessor | None = None
        self._base_size: int = base.vocab_size()
        first = TEXT_OFFSET + self._base_size
        self._ids = {piece: first + i for i, piece in enumerate(_APPENDED_PIECES)}
        self._texts: dict[int, str] = {}
        self.vocab_size: int = first + len(_APPENDED_PIECES)
        appended = {name: first + i for i, name in enumerate(_SPECIAL_NAMES)}
        self.special_tokens: Mapping[str, int] = {"pad": 0, "eos": self.piece_to_id("</s>"), **appended}

    def encode(
        self,
        text: str,
        *,
        linebreaks: bool | None = None,
        whitespaces: bool | None = None,
        special_tokens: bool = False,
        dummy_prefix: bool = True,
    ) -> list[int]:
        """Ids of a text; special tokens typed in it are ordinary text.

        The options are the original's: ``linebreaks`` and ``whitespaces`` (tabs and runs of blanks) keep or collapse
        one kind alone, ``special_tokens`` takes ``[MASK]``, ``<sop>`` and so on in the text as the tokens,
        ``dummy_prefix=False`` puts no blank in front. Raises ``InputError`` for lone surrogates, and for
        ``whitespaces`` and ``special_tokens`` with ``whitespace="collapse"``, which has no such rows.
        """
        if _SURROGATE.search(text):
            raise InputError("the text is not valid Unicode (lone surrogates)", hint="check that the input is UTF-8")
        if not self._keep and (whitespaces or special_tokens):
            raise InputError('whitespace="collapse" has no ids for special tokens, tabs and runs of blanks in a text')
        if self._keep if linebreaks is None else linebreaks:
            text = text.replace("\n", "<n>")
        if self._keep if whitespaces is None else whitespaces:
            text = _BLANKS.sub(lambda blanks: f"<|blank_{len(blanks[0])}|>", text.replace("\t", _TAB))
        processor = self._special() if special_tokens else self._processor
        # Without dummy prefix the dummy blank goes in front of an <n>, and both are cut off.
        indices = processor.encode(text) if dummy_prefix else processor.encode("<n>" + text)[2:]
        return [index + TEXT_OFFSET for index in indices]

    def decode(self, ids: Iterable[int], *, special_tokens: bool = False) -> str:
        """Text of ids; special tokens give nothing, or their names with ``special_tokens``.

        Blanks before the first text are dropped as SentencePiece does, ``<unk>`` gives " \u2047 ", bytes that form no
        character give U+FFFD each. Raises ``InputError`` for an id without text: image tokens (the pad 0 is one) and
        everything from ``vocab_size`` on. ``<n>`` and the like are restored by id, the original replaces the
        characters (only a text that a model spells out as `<`, `n`, `>` shows the difference).
        """
        stream = self.stream(special_tokens=special_tokens)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def stream(self, *, special_tokens: bool = False) -> IcetkStream:
        """A decoder for ids that come one at a time; it never emits half a character."""
        return IcetkStream(self, special_tokens)

    def detokenize(self, ids: Iterable[int]) -> str:
        """What the original's generation prints (SPEC 7.3): command tokens as ``[sop]``, ``[[MASK]]``, ``[</s>]``.

        quirk: the tab and the runs of blanks are commands too (``[<t>]``, ``[<blank_4>]``), and the text after each
        command loses its leading blank; ``decode`` has neither.
        """
        names = {token: name for name, token in self.special_tokens.items() if name not in ("pad", "eos")}
        names[self.special_tokens["eos"]] = "</s>"
        names |= {self._ids[piece]: piece.replace("|", "").replace("tab", "t") for piece in _WHITESPACE_PIECES}
        result, stream = "", self.stream()
        for token in map(operator.index, ids):
            if token in names:
                result += stream.flush() + f"[{names[token]}]"
                stream = self.stream()
            else:
                result += stream.push(token)
        return result + stream.flush()

    def save(self, folder: str | Path) -> list[str]:
        """Write the file, as it was read, into a folder and return its name."""
        with atomic_write(Path(folder) / FILE_NAME) as file:
            file.write(self._model)
        return [FILE_NAME]

    def id_to_piece(self, token: int) -> str:
        """The piece of an id, as SentencePiece writes it; ``<image_7>`` for 7. Raises ``InputError``."""
        if 0 <= token < TEXT_OFFSET:
            return f"<image_{token}>"
        index = self._index(token)
        if index >= self._base_size:
            return _APPENDED_PIECES[index - self._base_size]
        return self._processor.id_to_piece(index)

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece; that of ``<unk>`` where there is none."""
        if image := _IMAGE.fullmatch(piece):
            return int(image[1])
        return self._ids[piece] if piece in self._ids else self._processor.piece_to_id(piece) + TEXT_OFFSET

    def byte_of(self, token: int) -> int | None:
        """The byte that a row of the byte fallback stands for; None for every other id. Raises ``InputError``."""
        byte = self._index(token) - self._base_size - _FIRST_BYTE
        return byte if byte >= 0 else None

    def text_of(self, token: int) -> str:
        """Text of one id that is no byte, blanks for every U+2581; "" for special tokens. Raises ``InputError``."""
        text = self._texts.get(token)
        if text is None:
            index = self._index(token)
            piece = self.id_to_piece(token)
            if index >= self._base_size:
                text = _WHITESPACE_PIECES.get(piece, "")
            elif self._processor.is_control(index):
                text = ""
            elif self._processor.is_unknown(index):
                text = _UNKNOWN_TEXT
            else:
                text = "\n" if piece == "<n>" else piece.replace(_META, " ")
            self._texts[token] = text
        return text

    def begins_with_meta(self, token: int) -> bool:
        """Whether this id's text begins with SentencePiece's blank, which vanishes before the first text."""
        return self._index(token) < self._base_size and self.id_to_piece(token).startswith(_META)

    def _index(self, token: int) -> int:
        if not TEXT_OFFSET <= token < self.vocab_size:
            what = "is an image token, which has no text" if 0 <= token < TEXT_OFFSET else "is outside the vocabulary"
            raise InputError(f"id {token} {what} (text ids are {TEXT_OFFSET} to {self.vocab_size - 1})")
        return token - TEXT_OFFSET

    def _special(self) -> sentencepiece.SentencePieceProcessor:
        if self._special_processor is None:
            self._special_processor = _processor(self._model + _appended(_USER_DEFINED))
        return self._special_processor


class IcetkStream:
    """Decodes ids one at a time; the pieces joined equal ``IcetkTokenizer.decode`` of all of them."""

    def __init__(self, tokenizer: IcetkTokenizer, special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_tokens.values()) if special_tokens else set()
        self._special -= {tokenizer.special_tokens["eos"]}  # control in either instance of the original
        self._written = False
        self._bytes = b""

    def push(self, token: int) -> str:
        """Text that has become certain with this id; may be empty. Raises ``InputError`` for an id without text."""
        token = operator.index(token)
        byte = self._tokenizer.byte_of(token)
        if byte is not None:
            self._bytes += bytes([byte])
            text = self._characters(final=False)
        else:
            text = self.flush()
            written = self._written or text != ""
            new = self._tokenizer.id_to_piece(token) if token in self._special else self._tokenizer.text_of(token)
            text += new[1:] if not written and self._tokenizer.begins_with_meta(token) else new
        self._written = self._written or text != ""
        return text

    def flush(self) -> str:
        """Whatever is left at the end (each byte of an incomplete character becomes U+FFFD)."""
        return self._characters(final=True)

    def _characters(self, final: bool) -> str:
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode()
                self._bytes = b""
            except UnicodeDecodeError as error:
                if error.start == 0:
                    if not final and error.reason == "unexpected end of data":
                        break
                    text += "\ufffd"
                    self._bytes = self._bytes[1:]
                else:
                    text += self._bytes[: error.start].decode()
                    self._bytes = self._bytes[error.start :]
        return text


def is_icetk(model: bytes) -> bool:
    """Whether a SentencePiece file begins like icetk's: ``<unk>``, ``<s>``, ``</s>``, ``<pad>``, ``<n>``."""
    pieces = []
    for piece in _leading_pieces(model):
        pieces.append(piece)
        if len(pieces) == len(_FIRST_PIECES):
            break
    return pieces == _FIRST_PIECES


def _checked(model: bytes, path: Path, released: bool) -> sentencepiece.SentencePieceProcessor:
    # The processor of the file as it is, once it is known to be icetk's.
    whole = hashlib.sha256(model).hexdigest() == SHA256
    try:
        if not model:  # sentencepiece takes no bytes for no model, and complains later
            raise ValueError("empty")
        processor = _processor(model)
    except Exception as error:  # sentencepiece raises RuntimeError and ValueError for a foreign file
        raise TokenizerError(f"`{path}` ({len(model):,} bytes) is not a SentencePiece model", hint=_HINT, path=path) from error
    size: int = processor.vocab_size()
    if not whole and (released or not is_icetk(model)):
        found = f"{size:,} pieces instead of {_RELEASED_PIECES:,}"
        if size == _RELEASED_PIECES:
            found = f"{len(model):,} bytes whose SHA-256 is not {SHA256[:8]}...{SHA256[-3:]}"
        elif processor.piece_to_id("[gMASK]") != processor.unk_id():
            found = f"{size:,} pieces with special tokens among them"
        raise TokenizerError(f"`{path}` is not icetk's `{FILE_NAME}`: it holds {found}", hint=_HINT, path=path)
    return processor


_HINT = f"icetk downloads the right file at its first use (SHA-256 {SHA256})"


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


# Just enough of protobuf's wire format. A field is a number and a length, then the bytes; messages that are joined
# byte by byte merge: lists grow, and single values, also in inner messages, are replaced.


def _varint(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes([*result, number])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _appended(special_type: int) -> bytes:
    """The rows from 150,000 on and the byte fallback, to be put after the file's bytes (SPEC 7.1)."""
    types = [special_type] * _FIRST_WHITESPACE + [_USER_DEFINED] * len(_WHITESPACE_PIECES) + [_BYTE] * len(_BYTE_PIECES)
    result = b""
    for piece, kind in zip(_APPENDED_PIECES, types, strict=True):
        score = _varint(2 << 3 | 5) + struct.pack("<f", 0.0)
        result += _message(1, _message(1, piece.encode()) + score + _varint(3 << 3) + _varint(kind))
    byte_fallback = _varint(35 << 3) + b"\1"
    return result + _message(2, byte_fallback)


def _leading_pieces(model: bytes) -> Iterator[str]:
    # The pieces at the beginning of a file; ends at the first thing that is none.
    def length(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (model[at] & 127) << shift
            shift += 7
            at += 1
            if model[at - 1] < 128:
                return value, at

    at = 0
    try:
        while model[at] == 1 << 3 | 2:
            size, start = length(at + 1)
            if model[start] != 1 << 3 | 2:
                return
            piece_size, piece_start = length(start + 1)
            yield model[piece_start : piece_start + piece_size].decode()
            at = start + size
    except (IndexError, UnicodeDecodeError):
        return
