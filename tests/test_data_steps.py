"""The steps of a preparation, each alone: reading, cleaning, languages, duplicates, decontamination."""

from __future__ import annotations

import gzip
import json
import random
import sys

import numpy as np
import pytest
import zstandard
from test_data_prepare import chinese, english, source, write_rows

from openglm.data import cleaning, duplicates, language
from openglm.data.cleaning import RULES, find_fault, repair
from openglm.data.decontamination import build_index, cut, find_passage, open_index, read_records, runs
from openglm.data.language import identify
from openglm.data.ngrams import ngrams, split_units
from openglm.data.prepare import prepare
from openglm.data.readers import read_documents
from openglm.data.shards import open_shards
from openglm.errors import DataError
from openglm.tokenizers import load_tokenizer

# Reading


@pytest.mark.parametrize("library", ["ftfy", "py3langid.langid", "rensa"])
def test_a_missing_library_is_named_with_its_extra(tmp_path, tiny_tokenizer_path, monkeypatch, library):
    for module, cached in ((cleaning, "_fix_encoding"), (language, "_identifier")):
        getattr(module, cached).cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    write_rows(tmp_path / "a.jsonl", [{"text": english(1) + " schÃ¶n"}])
    with pytest.raises(DataError, match=rf"needs {library.split('.')[0]}; .*openglm\[train\]"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", tiny_tokenizer_path, workers=1)


def test_parquet_and_gzip_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"text {k}", "id": f"i{k}", "metadata": {"language": "zh", "url": "u"}, "unused": k} for k in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    found = list(read_documents([tmp_path]))
    assert [d.text for d in found] == [row["text"] for row in rows] and found[3].id == "i3" and found[3].language == "zh"
    pq.write_table(pa.table({"prompt": ["p"], "answer": ["a"]}), tmp_path / "a.parquet")
    assert [(d.text, d.answer) for d in read_documents([tmp_path])] == [("p", "a")]
    pq.write_table(pa.table({"title": ["p"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column `text`"):
        list(read_documents([tmp_path]))
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2 has no `text`"):
        list(read_documents([tmp_path]))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="not valid Parquet"):
        list(read_documents([tmp_path]))


def test_files_that_break_off_are_refused(tmp_path):
    noise = "".join(random.Random(1).choices("abcdefghij ", k=400_000))
    rows = [json.dumps({"text": noise[k : k + 1000]}) for k in range(0, 400_000, 1000)]
    data = "\n".join(rows).encode()
    for name, packed in (("a.jsonl.zst", zstandard.compress(data)), ("a.jsonl.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        assert len(list(read_documents([tmp_path / name]))) == 400
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(DataError, match=r"incomplete|not valid JSON"):
            list(read_documents([tmp_path / name]))
        (tmp_path / name).write_bytes(packed[:-3])
        with pytest.raises(DataError, match="incomplete"):
            list(read_documents([tmp_path / name]))


def test_files_of_several_frames_are_read_to_their_end(tmp_path):
    lines = [b'{"text": "one"}\n', b'{"text": "two"}\n']
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert [d.text for d in read_documents([tmp_path])] == ["one", "two"] * 2


# Cleaning


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("â€œschÃ¶nâ€\u009d, cafe\u0301", "“schön”, café"),
        ("a\u200bb\x00\u00adc\r\nd\u2028e   \n\n\n\n f\u3000", "abc\nd\ne\n\n f"),
        ("\ud83d\ude00 \ud800x", "😀 x"),
        ("Ｆｕｌｌ，　宽。“引号” ‘x’ ﬁ &amp;", "Ｆｕｌｌ，　宽。“引号” ‘x’ ﬁ &amp;"),
        ("mÃ¼de\nDie Ära naïve Größe Â£", "müde\nDie Ära naïve Größe £"),
    ],
)
def test_texts_are_mended(text, mended):
    assert repair(text) == mended
    assert repair(mended) == mended


def test_every_rule_has_its_threshold():
    good, zh = english(1, 20), chinese(1, 20)
    assert find_fault(good, "en") is None and find_fault(zh, "zh") is None
    assert find_fault(" ".join(good.split()[: RULES["en"].too_short - 1]), "en") == "too_short"
    assert find_fault(zh[: RULES["zh"].too_short - 1], "zh") == "too_short"
    assert find_fault(good + " *=" * len(good.split()) * 3, "en") == "few_letters"
    assert find_fault("\n".join([good, *["Home About Contact"] * 40]), "en") == "repeated_lines"
    assert (
        find_fault(good + " " + " ".join(["buy the best shoes here at once for very little money"] * 30), "en")
        == "repeated_passages"
    )
    assert find_fault(zh + "本店出售各种鞋子价格便宜欢迎光临请随时联系我们" * 30, "zh") == "repeated_passages"
    assert find_fault(" ".join(f"{k:032x}" for k in range(10**30, 10**30 + 60)), "en") == "long_words"
    assert find_fault(good.replace("the", "\ufffd"), "en") == "broken"


# Languages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (english(1), "en"),
        (chinese(1), "zh"),
        ("中文里常有 English words，例如 Python 和 GPU，但它仍是中文的句子，读起来没有问题。", "zh"),
        ("これは日本語の文章です。ひらがなとカタカナがたくさん含まれています。", "other"),
        ("이것은 한국어 문장입니다. 한글로 쓰여 있습니다.", "other"),
        ("Это предложение написано по-русски, и его нельзя принять за английское.", "other"),
        ("Der alte Bäcker hat gestern die Brücke repariert, weil der Sturm sie beschädigt hatte.", "other"),
        ("OK, 42!", "en"),
        ("1 + 1 = 2", "en"),
        ("--- *** ---", "other"),
    ],
)
def test_languages_are_told_apart(text, expected):
    assert identify(text) == expected


def test_a_declared_language_wins():
    for declared, expected in (("zh-CN", "zh"), ("cmn_Hani", "zh"), ("eng_Latn", "en"), ("EN", "en"), ("deu", "other")):
        assert identify("whatever", declared) == expected
    assert identify(chinese(1), "und") == identify(chinese(1), "") == "zh"


# N-grams


def units_of(text: str) -> list[str]:
    """The readable twin of ``split_units``."""
    units, word = [], ""
    for character in text + " ":
        is_han = "\u4e00" <= character <= "\u9fff"
        if character.isalnum() and not is_han:
            word += character.lower()
            continue
        units += [word] if word else []
        units += [character] if is_han else []
        word = ""
    return units


def test_units_are_words_and_characters():
    rng = random.Random(3)
    names: dict[str, int] = {}
    for _ in range(200):
        text = "".join(rng.choice("abABé1 .,-的了中\n") for _ in range(rng.randrange(60)))
        units, expected = split_units(text), units_of(text)
        assert [text[a:b].lower() for a, b in zip(units.starts, units.ends, strict=True)] == expected
        for hashed, unit in zip(units.hashes.tolist(), expected, strict=True):
            assert names.setdefault(unit, hashed) == hashed
        grams = ngrams(units.hashes, 3)
        assert len(grams) == max(len(expected) - 2, 0)
        assert len(set(grams.tolist())) == len({tuple(expected[k : k + 3]) for k in range(len(expected) - 2)})
    assert len(set(names.values())) == len(names)
    full, half = split_units("ＡＢＣ　１２"), split_units("abc 12")
    assert full.hashes.tolist() == half.hashes.tolist()


# Duplicates


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


@pytest.mark.parametrize("make", [english, chinese])
def test_signatures_estimate_the_similarity(make):
    text = make(1, 200)
    for share in (0.0, 0.02, 0.1, 0.3, 1.0):
        other = text[: int(len(text) * (1 - share))] + make(2, 200)[: int(len(text) * share)]
        sets = [duplicates.shingles(split_units(t)) for t in (text, other)]
        first, second = duplicates.signatures(sets)
        assert abs(float(duplicates.similarity(first, second[None])[0]) - jaccard(*sets)) < 4 * 0.045


def test_the_first_of_near_duplicates_is_kept():
    """Against the twin that compares every pair: nothing is dropped without reason, and hardly anything is missed."""
    rng = random.Random(5)
    texts = []
    for k in range(70):
        words = english(k, 30).split()
        for _ in range(rng.randrange(1, 4)):
            for _ in range(rng.choice([0, 1, 3, 12, 60])):
                words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
            texts.append(" ".join(words))
    sets = [duplicates.shingles(split_units(text)) for text in texts]
    found = duplicates.near_duplicates(duplicates.signatures(sets), np.ones(len(sets), bool), 0.8)
    kept: list[int] = []
    missed = 0
    for k, shingles in enumerate(sets):
        near = max((jaccard(shingles, sets[other]) for other in kept), default=0.0)
        if found[k] >= 0:
            assert found[k] in kept and jaccard(shingles, sets[found[k]]) > 0.65
        else:
            missed += near > 0.9
            kept.append(k)
    assert (found >= 0).sum() > 20 and missed == 0


def test_exact_duplicates_point_to_the_first():
    texts = ["One text.", "Another", "one   TEXT.", "ＯＮＥ text.", "another ", "third"]
    prints = np.frombuffer(b"".join(map(duplicates.fingerprint, texts)), "<u8").reshape(-1, 2)
    assert duplicates.exact_duplicates(prints).tolist() == [-1, -1, 0, 0, 1, -1]


# Decontamination


def test_evaluation_texts_of_any_format_are_read(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"q": "one", "o": ["two", {"x": "three"}], "n": 4}\n'))
    (tmp_path / "b.json").write_text('{"version": "1", "data": [{"q": "four"}, {"q": "five"}]}')
    (tmp_path / "c.json").write_text('{"q": "six"}\n{"q": "seven"}\n')
    (tmp_path / "d.csv").write_text('q,a\n"eight, nine",ten\n')
    (tmp_path / "e.txt").write_text("eleven\ntwelve")
    (tmp_path / "f.bin").write_bytes(b"\xff\xff")
    expected = {
        "deep/a.jsonl.zst": [["one", "two", "three"]],
        "b.json": [["1"], ["four"], ["five"]],
        "c.json": [["six"], ["seven"]],
        "d.csv": [["q", "a"], ["eight, nine", "ten"]],
        "e.txt": [["eleven\ntwelve"]],
    }
    for name, records in expected.items():
        assert list(read_records(tmp_path / name)) == records
    index = build_index(tmp_path, tmp_path / "index")
    assert {file["name"] for file in index.meta["files"]} == set(expected)
    (tmp_path / "b.json").write_text("{nothing")
    with pytest.raises(DataError, match="not valid JSON"):
        build_index(tmp_path, tmp_path / "index")


@pytest.fixture
def evaluation(tmp_path):
    """Questions in both languages, all with the same long instruction."""
    ask = "Read the following passage with care and then answer the question that is asked below it in one word."
    folder = tmp_path / "evaluation"
    write_rows(folder / "en.jsonl", [{"prompt": ask, "text": english(7000 + k, 3)} for k in range(30)])
    write_rows(folder / "zh.jsonl", [{"question": chinese(7000 + k, 3)} for k in range(30)])
    return folder, ask


def test_runs_are_found_and_templates_are_not(tmp_path, evaluation):
    folder, ask = evaluation
    build_index(folder, tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert index is not None and index.meta["records"] == 60 and index.meta["templates"] >= 1
    clean = f"{english(1)} {ask} {english(2)}"
    assert index.find(split_units(clean)) == []
    secret = " ".join(english(7004, 3).split()[2:20])
    text = f"{english(1)} {secret.upper()} {english(2)}"
    (match,) = index.find(split_units(text))
    assert text[match.start : match.end].lower().startswith(secret.lower().rstrip(".,")) and index.where(match.record) == (
        "en.jsonl",
        5,
    )
    assert secret in find_passage(folder, "en.jsonl", 5, secret)
    secret = chinese(7009, 3)[3:26]
    text = chinese(1) + secret + chinese(2)
    assert [index.where(match.record) for match in index.find(split_units(text))] == [("zh.jsonl", 10)]


def test_no_run_reaches_over_the_border_of_two_texts(tmp_path):
    words = english(7000, 3).split()
    write_rows(tmp_path / "e" / "a.jsonl", [{"a": " ".join(words[:9]), "b": " ".join(words[9:18])}])
    index = build_index(tmp_path / "e", tmp_path / "index")
    assert index.meta["runs"] == 0 and index.meta["short_texts"] == 2
    assert len(runs(split_units(" ".join(words[:18])))[0]) > 0
    assert index.find(split_units(" ".join(words))) == []


def test_matches_are_cut_out_with_their_surroundings(tmp_path, evaluation, tiny_tokenizer_path):
    folder, _ = evaluation
    secret = english(7003, 3)
    before, after = english(1, 30), english(2, 30)
    rows = [{"id": "cut", "text": f"{before} {secret} {after}"}, {"id": "gone", "text": f"Short text. {secret}"}]
    rows += [{"id": "list", "text": " ".join(f"{english(100 + k, 12)} {english(7000 + k, 3)}" for k in range(14))}]
    write_rows(tmp_path / "corpus" / "web.jsonl", [*rows, {"id": "clean", "text": english(3, 30)}])
    write_rows(
        tmp_path / "corpus" / "chat.jsonl", [{"prompt": "Tell a tale.", "answer": secret}, {"prompt": "Hi", "answer": "Hi!"}]
    )
    report = prepare([tmp_path / "corpus"], tmp_path / "out", tiny_tokenizer_path, evaluation=folder, workers=1)
    web = source(report, "web")
    assert web["dropped"] == {"contaminated": {"documents": 2, "bytes": sum(len(row["text"]) for row in rows[1:])}}
    assert web["cut"] == {"documents": 1, "passages": 1} and web["kept"]["documents"] == 3
    assert source(report, "chat")["dropped"]["contaminated"]["documents"] == 1
    assert web["matches"]["en.jsonl"] >= 16
    sample = next(sample for sample in report["dropped_samples"] if sample["reason"] == "cut")
    assert secret[:80] in sample["passage"] and secret[:80] in sample["evaluation"] and sample["record"] == 4
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    (shard,) = [shard for shard in open_shards(tmp_path / "out") if shard.info.name == "web"]
    first, second = (tokenizer.decode(shard.document(k).tolist()) for k in (0, 1))
    assert before.startswith(first) and len(before) - 230 < len(first) <= len(before) - 195
    assert after.endswith(second) and len(after) - 230 < len(second) <= len(after) - 195


def test_remainders_and_margins():
    from openglm.data.decontamination import Match

    text = "a" * 1000
    assert [len(piece) for piece in cut(text, [Match(450, 550, 0)], "en")] == [250, 250]
    assert [len(piece) for piece in cut(text, [Match(350, 450, 0)], "en")] == [350], "a remainder under 200 goes"
    assert [len(piece) for piece in cut("字" * 300, [Match(100, 120, 0)], "zh")] == [120]
    many = "b" * 100_000
    assert len(cut(many, [Match(k * 5000, k * 5000 + 10, 0) for k in range(1, 10)], "en")) == 10
    assert cut(many, [Match(k * 5000, k * 5000 + 10, 0) for k in range(1, 11)], "en") == []
