"""Our own tokenizer: a SentencePiece unigram model that loses nothing.

The identity normaliser, no dummy prefix, byte fallback for whatever has no piece, and the special tokens among the
pieces as control symbols, which no text can produce. SentencePiece writes a blank as U+2581; a U+2581 that a user
typed therefore goes through its three bytes, and comes back as typed. ``decode(encode(text)) == text`` for every
text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece

from openglm.errors import DataError, InputError, TokenizerError
from openglm.storage import atomic_write
from openglm.tokenizers.base import ByteStream

FILE_NAME = "unigram.model"

#: Control symbols in id order; "<unk>" is 1 and never produced, because every byte has a piece.
SPECIAL_PIECES = {
    "pad": "[pad]",
    "unk": "<unk>",
    "eos": "</s>",
    "[MASK]": "[MASK]",
    "[gMASK]": "[gMASK]",
    "[sMASK]": "[sMASK]",
    "eod": "<eod>",
    "sop": "<sop>",
    "eop": "<eop>",
    "ENC": "<ENC>",
    "dBLOCK": "<dBLOCK>",
}

_META = "\u2581"
_NEEDS_BYTES = re.compile("([\u2581\0]+)")  # the blank's stand-in, and NUL, which ends a C string
_PROBE = "  \t a  \uff22\r\n\n "  # blanks at the ends and in runs, full width: what other normalisers change
_SURROGATE = re.compile("[\ud800-\udfff]")


class UnigramTokenizer:
    """A lossless unigram tokenizer, read from one SentencePiece file. See ``Tokenizer`` for the methods."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            self._model = path.read_bytes()
            if not self._model:  # sentencepiece takes no bytes for no model, and complains later
                raise ValueError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer `{path}`: {error.strerror}", path=path) from error
        except Exception as error:  # sentencepiece raises RuntimeError and ValueError for a foreign file
            raise TokenizerError(f"`{path}` is not a SentencePiece model", path=path) from error
        processor = self._processor
        self.path = path
        self.vocab_size: int = processor.vocab_size()
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        ids = {piece: i for i, piece in enumerate(pieces)}
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        missing = [piece for piece in (*SPECIAL_PIECES.values(), *byte_pieces) if piece not in ids]
        if missing:
            raise TokenizerError(
                f"`{path}` has no piece `{missing[0]}`, so it is not a tokenizer made by `glm tokenizer train`",
                path=path,
            )
        self.special_tokens: Mapping[str, int] = {name: ids[piece] for name, piece in SPECIAL_PIECES.items()}
        self._byte_ids = [ids[piece] for piece in byte_pieces]
        self._bytes: list[bytes] = [piece.replace(_META, " ").encode() for piece in pieces]
        for byte, i in enumerate(self._byte_ids):
            self._bytes[i] = bytes([byte])
        for i in range(self.vocab_size):
            if processor.is_control(i) or processor.is_unknown(i):
                self._bytes[i] = b""
        if self.decode(self.encode(_PROBE)) != _PROBE:  # cut off before its last part, or made with other options
            raise TokenizerError(f"`{path}` is a tokenizer that changes text, so it is damaged or foreign", path=path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens typed in it are ordinary text. Raises ``InputError`` for lone surrogates."""
        if _SURROGATE.search(text):
            raise InputError("the text is not valid Unicode (lone surrogates)", hint="check that the input is UTF-8")
        ids: list[int] = []
        for part in _NEEDS_BYTES.split(text):
            if part[:1] in (_META, "\0"):
                ids += [self._byte_ids[byte] for byte in part.encode()]
            elif part:
                ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give nothing, bytes that form no character give U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def id_to_piece(self, token: int) -> str:
        """The piece of an id, as SentencePiece writes it."""
        return self._processor.id_to_piece(token)

    def byte_length(self, token: int) -> int:
        """UTF-8 bytes that an id stands for (0 for special tokens)."""
        return len(self._bytes[token])

    def stream(self) -> ByteStream:
        """A decoder for ids that come one at a time; it never emits half a character."""
        return ByteStream(self._bytes)

    def save(self, folder: str | Path) -> list[str]:
        """Write the model file into a folder and return its name."""
        with atomic_write(Path(folder) / FILE_NAME) as file:
            file.write(self._model)
        return [FILE_NAME]


_SENTENCE_END = re.compile(r"(?<=[.!?;。！？；])(?=\s?\S)")


def training_lines(texts: Iterable[str], longest: int = 400) -> Iterator[str]:
    """Cut documents into the short lines that SentencePiece trains on, at sentence ends where there are any.

    Raises ``DataError`` for a text with lone surrogates.
    """
    for text in texts:
        if _SURROGATE.search(text):
            raise DataError("a training text is not valid Unicode (lone surrogates)", hint="check that the files are UTF-8")
        for paragraph in text.split("\n"):
            line = ""
            for sentence in _SENTENCE_END.split(paragraph.replace(_META, " ")):
                if line and len(line) + len(sentence) > longest:
                    yield line
                    line = ""
                line += sentence
                while len(line) > 2 * longest:
                    yield line[:longest]
                    line = line[longest:]
            if line.strip():
                yield line


def train_unigram(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int = 16_384,
    max_lines: int = 1_000_000,
    character_coverage: float = 0.9995,
    threads: int = 2,
    log: Callable[[str], None] | None = None,
) -> UnigramTokenizer:
    """Train a tokenizer on documents and write it to ``path``.

    ``vocab_size`` counts special tokens (11), the 256 bytes and the newline. ``max_lines`` bounds time and memory:
    SentencePiece draws that many lines. Raises ``TokenizerError`` when the text is too small for the vocabulary, or
    the vocabulary for the text's characters; what ``texts`` itself raises comes through. ``path`` is whole or absent.
    """
    path = Path(path)
    pieces = list(SPECIAL_PIECES.values())
    controls = [piece for piece in pieces if piece not in ("[pad]", "<unk>", "</s>")]
    if log:
        log(f"training a unigram tokenizer of {vocab_size:,} pieces")
    failures: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            yield from training_lines(texts)
        except BaseException as error:  # sentencepiece turns it into a RuntimeError of its own
            failures.append(error)
            raise

    with atomic_write(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=lines(),
                    model_writer=file,
                    model_type="unigram",
                    vocab_size=vocab_size,
                    normalization_rule_name="identity",
                    add_dummy_prefix=False,
                    remove_extra_whitespaces=False,
                    byte_fallback=True,
                    split_digits=True,
                    character_coverage=character_coverage,
                    max_sentence_length=16_384,
                    input_sentence_size=max_lines,
                    shuffle_input_sentence=True,
                    num_threads=threads,
                    pad_id=0,
                    unk_id=1,
                    eos_id=2,
                    bos_id=-1,
                    pad_piece="[pad]",
                    unk_piece="<unk>",
                    eos_piece="</s>",
                    control_symbols=controls,
                    user_defined_symbols=["\n"],
                    minloglevel=1,
                )
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise _training_error(str(error), vocab_size) from error
    return UnigramTokenizer(path)


def _training_error(reason: str, vocab_size: int) -> TokenizerError:
    # One sentence for the ways in which SentencePiece refuses; its own words name a line of its source.
    if "sentences_.empty()" in reason:
        return TokenizerError("there is no text to train a tokenizer on", hint="give files that hold text")
    if most := re.search(r"too high .*<= (\d+)", reason):
        return TokenizerError(
            f"the text yields at most {int(most[1]):,} pieces, not a vocabulary of {vocab_size:,}",
            hint="give more text or a smaller --vocab-size",
        )
    if least := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", reason):
        return TokenizerError(
            f"a vocabulary of {vocab_size:,} pieces is too small: special tokens, bytes and the text's characters alone"
            f" are {int(least[1]):,}",
            hint="give a larger --vocab-size",
        )
    return TokenizerError(f"no tokenizer of {vocab_size:,} pieces can be trained: {reason.splitlines()[-1].strip()}")
