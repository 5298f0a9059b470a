"""The released tokenizer: every recording of the original, and its rules on a stand-in vocabulary made here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openglm.config import RELEASED_SPECIAL_TOKENS
from openglm.errors import InputError, TokenizerError
from openglm.tokenizers import load_tokenizer
from openglm.tokenizers.icetk import FILE_NAME, IcetkTokenizer, is_icetk

SENTENCES = (
    "The little ship left the harbour before the sun was up, and nobody on the shore waved!",
    "She counted 12 apples, 7 pears and 1905 cherries [then] wrote the numbers in her book.",
    "A MASK is worn at night: a blank is a place where a word was taken out; is it <n> or not?",
    "小船在太阳升起之前离开了港口，岸上没有人挥手。",
    "你好世界！空白是句子里被拿走一个词的地方，读者把它放回去。",
)
SPECIAL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
PIECES = 125  # of the stand-in's file
FIRST = 20_000 + PIECES  # first appended row
TAB, BLANK_2, BYTE_0 = FIRST + 8, FIRST + 9, FIRST + 88
SIZE = FIRST + 344

ids_of_all_kinds = st.lists(
    st.integers(20_000, SIZE - 1)
    | st.integers(20_000, 20_006)
    | st.integers(FIRST, BYTE_0)
    | st.sampled_from([BYTE_0 + byte for byte in "é你😀\ufffd".encode() + b"\xed\xa0\xc0\xff"]),
    max_size=12,
)
texts_of_all_kinds = st.lists(
    st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\u3000", "\u2581", "\0", "a", "12", "你", "，", "😀", "\u200d", "the "])
    | st.sampled_from(SPECIAL_PIECES)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    max_size=10,
).map("".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("icetk") / FILE_NAME
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 5),
            model_writer=writer,
            vocab_size=PIECES,
            normalization_rule_name="nmt_nfkc",
            split_digits=True,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=["<n>"],
            num_threads=1,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="module")
def keep(file: Path) -> IcetkTokenizer:
    return IcetkTokenizer(file, released=False)


@pytest.fixture(scope="module")
def collapse(file: Path) -> IcetkTokenizer:
    return IcetkTokenizer(file, whitespace="collapse", released=False)


def pieces(tokenizer: IcetkTokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.id_to_piece(token) for token in tokenizer.encode(text, **options)]


def streamed(tokenizer: IcetkTokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


# --- the released file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(shared: Path) -> Path:
    path = shared / "reference" / FILE_NAME
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def released_keep(released: Path) -> IcetkTokenizer:
    tokenizer = load_tokenizer(released)
    assert isinstance(tokenizer, IcetkTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def released_collapse(released: Path) -> IcetkTokenizer:
    tokenizer = load_tokenizer(released.parent, whitespace="collapse")
    assert isinstance(tokenizer, IcetkTokenizer)
    return tokenizer


def golden(shared: Path, name: str) -> Any:
    return json.loads((shared / "golden" / "tokenizer" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("variant", "way", "options"),
    [
        ("glm130b", "keep", {}),
        ("glm130b_special_tokens", "keep", {"special_tokens": True}),
        ("glm130b_no_dummy_prefix", "keep", {"dummy_prefix": False}),
        ("glm130b_no_whitespace", "keep", {"linebreaks": False, "whitespaces": False}),
        ("icetk", "collapse", {}),
        ("icetk_keep_newlines", "collapse", {"linebreaks": True}),
    ],
)
def test_recorded_texts(
    shared: Path,
    released_keep: IcetkTokenizer,
    released_collapse: IcetkTokenizer,
    variant: str,
    way: str,
    options: dict[str, bool],
) -> None:
    tokenizer = released_keep if way == "keep" else released_collapse
    rows = golden(shared, "encode.json")
    assert len(rows) == 393
    for row in rows:
        expected = row.get(variant, row["glm130b"])
        ids = tokenizer.encode(row["text"], **options)
        assert ids == expected["ids"], row["text"]
        if variant == "glm130b":
            decoded = tokenizer.detokenize(ids)
        else:
            decoded = tokenizer.decode(ids, special_tokens=options.get("special_tokens", False))
        assert decoded == expected["decoded"], row["text"]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_recorded_pieces(shared: Path, released_keep: IcetkTokenizer) -> None:
    rows = golden(shared, "pieces.json")
    assert rows
    for row in rows:
        assert pieces(released_keep, row["text"]) == row["pieces"]


def test_recorded_ids(shared: Path, released_keep: IcetkTokenizer, released_collapse: IcetkTokenizer) -> None:
    functions: dict[str, Callable[[list[int]], str]] = {
        "detokenize": released_keep.detokenize,
        "decode": released_keep.decode,
        "decode_special": lambda ids: released_keep.decode(ids, special_tokens=True),
        "icetk_decode": released_collapse.decode,
    }
    rows = golden(shared, "decode.json")
    assert len(rows) == 108
    for row in rows:
        for name, function in functions.items():
            if name == "icetk_decode" and any(150_000 <= token < 150_344 for token in row["ids"]):
                continue  # plain icetk has no such rows and fails; a model that wrote them is decoded all the same
            if "error" in row[name]:
                with pytest.raises(InputError, match=r"which has no text|outside the vocabulary"):
                    function(row["ids"])
            else:
                assert function(row["ids"]) == row[name], (name, row["ids"])


def test_recorded_vocabulary(shared: Path, released_keep: IcetkTokenizer) -> None:
    recorded = golden(shared, "vocabulary.json")
    tokenizer = released_keep
    assert tokenizer.special_tokens == RELEASED_SPECIAL_TOKENS
    assert tokenizer.vocab_size == recorded["num_image_tokens"] + recorded["pieces_after_configuration"] == 150_344
    for name, token in recorded["special_tokens"].items():
        assert tokenizer.detokenize([token]) == ("[</s>]" if name == "eos" else f"[{name}]")
    for token, text in recorded["id_to_token"].items():
        if token != "0" and isinstance(text, str):  # quirk: the original writes the pad, but cannot decode it
            assert tokenizer.detokenize([int(token)]) == text
    for token, piece in recorded["getitem_int"].items():
        if isinstance(piece, str):
            assert tokenizer.id_to_piece(int(token)) == piece
        else:
            with pytest.raises(InputError):
                tokenizer.id_to_piece(int(token))
    for piece, token in recorded["getitem_str"].items():
        assert tokenizer.piece_to_id(piece) == token
    for word, token in recorded["token_to_id"].items():  # quirk: the first id of the word's encoding
        if word and isinstance(token, int) and tokenizer.special_tokens.get(word) is None and not word.startswith(("[", "<")):
            assert tokenizer.encode(word)[:1] in ([token], [tokenizer.piece_to_id("▁")])


def test_published_examples(released_keep: IcetkTokenizer) -> None:
    assert released_keep.encode("Hello World! I am icetk.") == [39316, 20932, 20035, 20115, 20344, 22881, 35955, 20007]
    assert released_keep.encode("你好世界！这里是 icetk。") == [20005, 94874, 84097, 20035, 94947, 22881, 35955, 83823]


def test_a_damaged_released_file_is_named(released: Path, tmp_path: Path) -> None:
    content = released.read_bytes()
    path = tmp_path / FILE_NAME
    path.write_bytes(content[:1_000_000])
    with pytest.raises(TokenizerError, match=r"`.*ice_text.model` .*is"):
        load_tokenizer(path)
    path.write_bytes(content + b"\x0a\x08\x0a\x06" + "☃☃".encode())
    with pytest.raises(TokenizerError, match=r"holds 130,001 pieces instead of 130,000"):
        load_tokenizer(path)
    path.write_bytes(content.replace("▁Hello".encode(), "▁Hallo".encode(), 1))
    with pytest.raises(TokenizerError, match=r"2,699,926 bytes whose SHA-256 is not 99871e0c\.\.\.c21"):
        load_tokenizer(path)


# --- the rules on the stand-in ----------------------------------------------------------------------------------------


def test_newlines_tabs_and_blanks_are_kept(keep: IcetkTokenizer) -> None:
    assert pieces(keep, "a\nb")[1:] == ["<n>", "b"]
    assert pieces(keep, "a\tb")[1:] == ["<|tab|>", "b"]
    assert pieces(keep, "a    b")[1:] == ["<|blank_4|>", "b"]
    assert pieces(keep, "a \nb")[1:] == ["▁", "<n>", "b"]
    assert keep.piece_to_id("<n>") == 20_004
    assert [keep.piece_to_id(piece) for piece in ("<|tab|>", "<|blank_2|>", "<0x00>")] == [TAB, BLANK_2, BYTE_0]
    for text in ("a\n\n\tb\t  c", "if a:\n        b\n\n    c  d", "a\n", "\n\n", "\ta", "  a", "a  "):
        assert keep.decode(keep.encode(text)) == text


@pytest.mark.parametrize("blanks", [2, 3, 79, 80, 82, 160, 163])
def test_runs_of_blanks_are_cut_at_eighty(keep: IcetkTokenizer, blanks: int) -> None:
    text = f"a{' ' * blanks}b"
    ids = keep.encode(text)
    assert ids.count(BLANK_2 + 78) == blanks // 80
    assert keep.decode(ids) == text


def test_a_lone_blank_at_the_end_is_lost(keep: IcetkTokenizer) -> None:
    assert keep.decode(keep.encode(" " * 81)) == " " * 80  # quirk of the original
    assert keep.encode(" ") == keep.encode("") == []
    assert keep.encode(" a ") == keep.encode("a")


def test_whitespace_is_collapsed(keep: IcetkTokenizer, collapse: IcetkTokenizer) -> None:
    text = "  a\n\n b\t\tc    d\r\n "
    assert collapse.encode(text) == collapse.encode("a b c d") == keep.encode(text, linebreaks=False, whitespaces=False)
    assert collapse.decode(collapse.encode(text)) == "a b c d"
    assert pieces(collapse, "a\nb", linebreaks=True)[1:] == ["<n>", "b"]
    assert pieces(keep, "a\nb  c", linebreaks=False).count("<n>") == 0
    assert pieces(keep, "a\nb  c", whitespaces=False).count("<|blank_2|>") == 0
    assert max(collapse.encode(text + "<|tab|> [MASK] <sop>")) < FIRST
    for options in ({"whitespaces": True}, {"special_tokens": True}):
        with pytest.raises(InputError, match='whitespace="collapse" has no ids'):
            collapse.encode(text, **options)


def test_unknown_characters(keep: IcetkTokenizer, collapse: IcetkTokenizer) -> None:
    ids = keep.encode("a😀\0")
    assert ids[-5:] == [BYTE_0 + byte for byte in "😀\0".encode()]
    assert keep.decode(ids) == "a😀\0"
    assert collapse.encode("a😀")[-1] == 20_000
    assert collapse.decode(collapse.encode("a😀")) == "a \u2047 "


def test_the_normaliser_and_digits(keep: IcetkTokenizer) -> None:
    assert keep.encode("ａ　１９０５！") == keep.encode("a 1905!")
    assert pieces(keep, "n1905")[-4:] == list("1905")
    assert keep.decode(keep.encode("a\u2028b\u2581c")) == "a b c"  # quirk: a typed mark is a blank


def test_special_tokens_typed_are_text(keep: IcetkTokenizer) -> None:
    text = "The [MASK] is </s> <sop> <unk> <0x41> [gMASK]"
    ids = keep.encode(text)
    assert not set(ids) & {*range(FIRST, TAB), 20_000, 20_001, 20_002, 20_003, BYTE_0 + 0x41}
    assert keep.decode(ids) == text
    ids = keep.encode(text, special_tokens=True)
    assert [token for token in ids if FIRST <= token < TAB] == [FIRST, FIRST + 4, FIRST + 1]
    assert keep.decode(ids, special_tokens=True) == text
    assert "MASK" not in keep.decode(ids)
    assert keep.encode("a<n>b<|tab|>c<|blank_3|>d") == keep.encode("a\nb\tc   d")  # quirk: these cannot be escaped


def test_no_dummy_prefix(keep: IcetkTokenizer) -> None:
    assert pieces(keep, "你好")[0] == "▁"
    assert pieces(keep, "你好", dummy_prefix=False)[0] != "▁"
    assert keep.encode("", dummy_prefix=False) == []


def test_decode_drops_leading_blanks_and_specials(keep: IcetkTokenizer) -> None:
    lone = keep.piece_to_id("▁")
    word = next(token for token in range(20_006, FIRST) if re.fullmatch("▁[a-z]+", keep.id_to_piece(token)))
    text = keep.id_to_piece(word)[1:]
    assert keep.decode([lone, lone, word, word]) == f"{text} {text}"
    assert keep.decode([20_004, word]) == f"\n {text}"
    assert keep.decode([FIRST, 20_002, word, FIRST + 4, 20_001, 20_003]) == text
    assert keep.decode([20_000, word]) == f" \u2047  {text}"
    assert keep.decode([BLANK_2, word]) == f"   {text}"
    assert keep.detokenize([word, FIRST + 4, word, TAB, BLANK_2 + 2, 20_002, FIRST, word, 20_004]) == (
        f"{text}[sop]{text}[<t>][<blank_4>][</s>][[MASK]]{text}\n"
    )


def test_bytes_become_characters_or_replacement_marks(keep: IcetkTokenizer) -> None:
    def of(content: bytes) -> list[int]:
        return [BYTE_0 + byte for byte in content]

    assert keep.decode(of("é你😀".encode())) == "é你😀"
    assert keep.decode(of("你".encode()[:2])) == "\ufffd\ufffd"  # one per byte
    assert keep.decode(of(b"A\xff\xed\xa0\x80B")) == "A\ufffd\ufffd\ufffd\ufffdB"
    assert keep.decode([*of("你".encode()[:2]), FIRST, *of("你".encode()[2:])]) == "\ufffd\ufffd\ufffd"
    stream = keep.stream()
    assert [stream.push(token) for token in of("😀".encode())] == ["", "", "", "😀"]
    stream = keep.stream()
    assert [stream.push(token) for token in of(b"\xe4\xbd")] == ["", ""]
    assert stream.push(20_004) == "\ufffd\ufffd\n"
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None)
@given(ids=ids_of_all_kinds)
def test_stream_and_decode_equal_the_original_for_any_ids(keep: IcetkTokenizer, ids: list[int]) -> None:
    decoded = keep.decode(ids)
    assert "".join(streamed(keep, ids)) == decoded
    # The original lets SentencePiece decode and then replaces the characters of `<n>` and so on (SPEC 7.3).
    expected = keep._processor.decode([token - 20_000 for token in ids])
    expected = expected.replace("<n>", "\n").replace("<|tab|>", "\t")
    expected = re.sub(r"<\|blank_(\d+)\|>", lambda match: " " * int(match[1]), expected)
    assume("<n>" not in decoded)  # spelled out in ordinary pieces: the one difference
    assert decoded == expected


@settings(max_examples=300, deadline=None)
@given(text=texts_of_all_kinds)
def test_any_text_is_encoded_stably(keep: IcetkTokenizer, collapse: IcetkTokenizer, text: str) -> None:
    for tokenizer in (keep, collapse):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(range(FIRST, TAB)), "a special token was typed"
        decoded = tokenizer.decode(ids)
        assert "".join(streamed(tokenizer, ids)) == decoded
        if tokenizer is keep:
            assert decoded.count("\ufffd") <= text.count("\ufffd"), "half a character was emitted"


@pytest.mark.parametrize("token", [-1, 0, 19_999, SIZE, 150_527])
def test_ids_without_text_are_refused(keep: IcetkTokenizer, token: int) -> None:
    for function in (keep.decode, keep.detokenize):
        with pytest.raises(InputError, match=f"id {token} is"):
            function([20_010, token])
    with pytest.raises(InputError, match=f"id {token} is"):
        keep.stream().push(token)


def test_invalid_unicode_is_refused(keep: IcetkTokenizer) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        keep.encode("a\ud83d")


def test_specials_follow_the_last_piece(keep: IcetkTokenizer, collapse: IcetkTokenizer) -> None:
    assert keep.vocab_size == collapse.vocab_size == SIZE
    assert keep.special_tokens == collapse.special_tokens
    moved = {name: token - 130_000 + PIECES if token >= 150_000 else token for name, token in RELEASED_SPECIAL_TOKENS.items()}
    assert keep.special_tokens == moved
    assert [keep.id_to_piece(FIRST + i) for i in range(8)] == SPECIAL_PIECES
    assert keep.id_to_piece(7) == "<image_7>"
    assert keep.piece_to_id("no such piece") == 20_000


def test_a_saved_tokenizer_is_the_same(keep: IcetkTokenizer, file: Path, tmp_path: Path) -> None:
    assert keep.save(tmp_path / "model") == [FILE_NAME]
    assert (tmp_path / "model" / FILE_NAME).read_bytes() == file.read_bytes()
    again = IcetkTokenizer(tmp_path / "model", released=False)  # the folder will do
    assert again.encode("The\tship 你好") == keep.encode("The\tship 你好")


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=rf"`.*` is not icetk's `ice_text.model`: it holds {PIECES} pieces instead"):
        load_tokenizer(file)
    with pytest.raises(TokenizerError, match=r"cannot read the tokenizer `.*nowhere.model`"):
        IcetkTokenizer(tmp_path / "nowhere.model")
    damaged = tmp_path / "damaged.model"
    for content in (b"", b"no model", file.read_bytes()[:1_001]):
        damaged.write_bytes(content)
        with pytest.raises(TokenizerError, match=re.escape(f"`{damaged}` ({len(content):,} bytes) is not a SentencePiece")):
            IcetkTokenizer(damaged)
    with pytest.raises(InputError, match="`whitespace` may be keep or collapse, not 'squeeze'"):
        IcetkTokenizer(file, whitespace="squeeze", released=False)


def test_icetk_is_known_by_its_first_pieces(file: Path) -> None:
    content = file.read_bytes()
    assert is_icetk(content)
    assert is_icetk(content[:100])
    assert not any(map(is_icetk, (b"", b"\x0a", content[:20], content[10:], b"\x0a\xff" * 9, b"text")))
