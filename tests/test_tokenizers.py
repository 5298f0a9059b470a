"""Our own tokenizer loses nothing, whatever is typed; and `load_tokenizer` names what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.config import OWN_SPECIAL_TOKENS
from openglm.errors import DataError, InputError, TokenizerError
from openglm.tokenizers import MASK_WORDS, load_tokenizer
from openglm.tokenizers.unigram import FILE_NAME, SPECIAL_PIECES, UnigramTokenizer, train_unigram

ENGLISH = (
    "The little ship left the harbour before the sun was up, and nobody on the shore waved.",
    "A blank is a place in a sentence where a word was taken out; the reader puts it back.",
    "She counted 12 apples, 7 pears and 1905 cherries, then wrote the numbers in her book.",
    "It rained for three days, so the children read stories and baked bread in the kitchen.",
    "def add(left, right):\n    return left + right\n\n\nfor index in range(10):\n\tprint(add(index, 1))",
)
CHINESE = (
    "小船在太阳升起之前离开了港口，岸上没有人挥手。",
    "空白是句子里被拿走一个词的地方，读者把它放回去。",
    "她数了十二个苹果、七个梨和许多樱桃，然后把数字写在本子上。",
    "下了三天雨，孩子们在厨房里读故事，烤面包。",
)
VOCABULARY = 440
#: The last part of our model files: normaliser "identity", no dummy prefix, blanks kept.
NORMALIZER = b"\x1a\x10\x0a\x08identity\x12\x00\x18\x00\x20\x00"

SAMPLES = (
    "",
    " ",
    "   two  and three   blanks at the ends   ",
    "tabs\tand\r\nline ends\n\n\nof\x0bevery\x0ckind\u2028\u2029\x85",
    "小船在太阳升起之前离开了港口。",
    "混合 English 和中文，１２３　全角！",
    "def f(x):\n        return {'a': [x ** 2, 0x1F]}  # \N{WAVE DASH}",
    "👨‍👩‍👧‍👦 🇨🇳 👍🏽 ☺️ \U0001f9d1\u200d\U0001f680",
    "typed \u2581 mark, \u2581\u2581\u2581 and \u2581",
    "NUL \0 and \0\0 \x01\x02\x1b[31m\x7f",
    "e\u0301 \u00e9 \ufb01 \u2460 \u00a0\u3000\ufeff\u200b\ufffd",
    "<0x41> <unk> </s> [pad] <eod> <sop> <eop> <ENC> <dBLOCK> [MASK] [gMASK] [sMASK]",
    "\u9f98\u9750\u9f49\u7229 \U0010ffff \ufffe \ue000",
)

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
PIECES_OF_TEXT = st.lists(
    st.sampled_from(["\u2581", "\0", " ", "  ", "\n", "\t", "\r\n", "\u3000", "a", "the ", "12", "船", "，", "😀", "\u200d"])
    | st.sampled_from(sorted(SPECIAL_PIECES.values()))
    | st.sampled_from(ENGLISH + CHINESE)
    | ANY_TEXT,
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / FILE_NAME
    train_unigram([*ENGLISH, *CHINESE] * 20, path, vocab_size=VOCABULARY, threads=1)
    return path


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> UnigramTokenizer:
    return UnigramTokenizer(file)


def streamed(tokenizer: UnigramTokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", [*SAMPLES, *ENGLISH, *CHINESE])
def test_samples_come_back_as_typed(tokenizer: UnigramTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=400, deadline=None)
@given(text=PIECES_OF_TEXT)
def test_every_text_comes_back_whole_and_in_pieces(tokenizer: UnigramTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.special_tokens.values()}, "a special token was typed"
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd"), "half a character was emitted"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_stream_equals_decode_for_any_ids(tokenizer: UnigramTokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_waits_for_whole_characters(tokenizer: UnigramTokenizer) -> None:
    ids = tokenizer.encode("\u9f98")  # no piece: three bytes
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "", "\u9f98"]
    stream = tokenizer.stream()
    assert stream.push(ids[0]) + stream.push(ids[1]) == ""
    assert stream.flush() == "\ufffd"


def test_common_words_are_pieces_and_numbers_are_digits(tokenizer: UnigramTokenizer) -> None:
    assert len(tokenizer.encode("the reader puts")) <= len("the reader puts") / 2
    assert len([i for i in tokenizer.encode("1905") if tokenizer.byte_length(i) == 1]) == 4
    assert tokenizer.id_to_piece(tokenizer.encode("\n")[0]) == "\n"


def test_special_tokens_stand_at_the_ids_of_the_presets(tokenizer: UnigramTokenizer) -> None:
    assert {name: tokenizer.special_tokens[name] for name in OWN_SPECIAL_TOKENS} == OWN_SPECIAL_TOKENS
    assert all(word in tokenizer.special_tokens for word in MASK_WORDS)
    assert tokenizer.decode(sorted(tokenizer.special_tokens.values())) == ""
    assert tokenizer.vocab_size == VOCABULARY
    assert all(tokenizer.byte_length(i) == 0 for i in tokenizer.special_tokens.values())


def test_byte_lengths_add_up_to_the_text(tokenizer: UnigramTokenizer) -> None:
    for text in SAMPLES:
        assert sum(map(tokenizer.byte_length, tokenizer.encode(text))) == len(text.encode())


@pytest.mark.parametrize("token", [-1, VOCABULARY, 150_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: UnigramTokenizer, token: int) -> None:
    with pytest.raises(InputError, match=f"id {token} is outside the vocabulary of {VOCABULARY}"):
        tokenizer.decode([400, token])
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenizer.stream().push(token)


def test_invalid_unicode_is_refused(tokenizer: UnigramTokenizer) -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode(text)


def test_a_saved_tokenizer_is_the_same(tokenizer: UnigramTokenizer, tmp_path: Path) -> None:
    assert tokenizer.save(tmp_path / "model") == [FILE_NAME]
    for again in (load_tokenizer(tmp_path / "model"), load_tokenizer(tmp_path / "model" / FILE_NAME)):
        assert isinstance(again, UnigramTokenizer)
        assert [again.encode(text) for text in SAMPLES] == [tokenizer.encode(text) for text in SAMPLES]


def test_training_twice_gives_the_same_file(file: Path, tmp_path: Path) -> None:
    train_unigram([*ENGLISH, *CHINESE] * 20, tmp_path / "again.model", vocab_size=VOCABULARY, threads=1)
    assert (tmp_path / "again.model").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([*ENGLISH], 5_000, r"yields at most \d+ pieces, not a vocabulary of 5,000; give more text"),
        ([*ENGLISH], 200, r"a vocabulary of 200 pieces is too small.*larger --vocab-size"),
        ([], 600, "there is no text"),
        (["", " \n \n"], 600, "there is no text"),
        ([*ENGLISH], -1, "no tokenizer of -1 pieces"),
    ],
)
def test_a_failed_training_says_why_and_leaves_no_file(texts: list[str], size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message) as raised:
        train_unigram(texts, tmp_path / "out" / FILE_NAME, vocab_size=size, threads=1)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_training_keeps_the_older_file_and_the_readers_error(file: Path, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    shutil.copy(file, path)

    def texts() -> Iterator[str]:
        yield ENGLISH[0]
        raise DataError("`corpus.jsonl` line 2 is not JSON")

    with pytest.raises(DataError, match="line 2"):
        train_unigram(texts(), path, vocab_size=600, threads=1)
    with pytest.raises(DataError, match="not valid Unicode"):
        train_unigram([b"\xff".decode("utf-8", "surrogateescape")], path, vocab_size=600, threads=1)
    assert path.read_bytes() == file.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]


def test_what_is_no_tokenizer_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"there is no tokenizer at `.*nowhere`"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"the folder `.*` holds no tokenizer \(ice_text.model or unigram.model\)"):
        load_tokenizer(tmp_path)
    for content in (b"", b"not a model at all", file.read_bytes()[:-100]):
        damaged = tmp_path / "damaged.model"
        damaged.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"`.*damaged.model` is not a SentencePiece model") as raised:
            load_tokenizer(damaged)
        assert raised.value.path == damaged
    damaged.write_bytes(file.read_bytes()[: -len(NORMALIZER)])  # still a model, but with SentencePiece's own normaliser
    with pytest.raises(TokenizerError, match=r"`.*damaged.model` is a tokenizer that changes text"):
        load_tokenizer(damaged)
    (tmp_path / "ice_text.model").write_bytes(file.read_bytes())
    (tmp_path / "unigram.model").write_bytes(file.read_bytes())
    with pytest.raises(TokenizerError, match="holds two tokenizers"):
        load_tokenizer(tmp_path)
    assert isinstance(load_tokenizer(tmp_path / "ice_text.model"), UnigramTokenizer), "the content decides, not the name"


def test_a_foreign_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    path = tmp_path / "foreign.model"
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ENGLISH), model_writer=writer, vocab_size=60, minloglevel=2
        )
    with pytest.raises(TokenizerError, match=r"`.*foreign.model` has no piece `\[pad\]`"):
        load_tokenizer(path)


def test_whitespace_ways_are_checked(file: Path) -> None:
    with pytest.raises(InputError, match='"keep" or "collapse", not \'squeeze\''):
        load_tokenizer(file, whitespace="squeeze")
    with pytest.raises(InputError, match="cannot collapse whitespace"):
        load_tokenizer(file, whitespace="collapse")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, openglm.tokenizers; print(*({'torch', 'numpy', 'sentencepiece'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
