"""A corpus becomes shards: the same ones on any number of cores, after any interruption, and never half of them."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import GLM, refuse, run

from openglm.data.inputs import plan_inputs
from openglm.data.pieces import Options
from openglm.data.prepare import prepare
from openglm.data.report import kept_samples, read_report
from openglm.data.shards import open_shards
from openglm.errors import DataError, StorageError
from openglm.tokenizers import load_tokenizer

SUBJECTS = ["The baker", "An old sailor", "My neighbour", "The engineer", "A quiet student", "The mayor", "Her cousin"]
VERBS = ["repaired", "painted", "measured", "remembered", "described", "sold", "borrowed", "studied", "photographed"]
OBJECTS = ["the bridge", "a wooden clock", "three maps", "the harbour", "an empty theatre", "the northern road", "seeds"]
PLACES = ["in spring", "near the river", "before breakfast", "with great care", "for the first time", "after the storm"]
ZH = [
    ["老船长", "面包师", "我的邻居", "工程师", "小学生", "市长"],
    ["修好了", "画下了", "测量了", "卖掉了", "研究了", "记住了"],
]
ZH += [
    ["那座大桥", "一只木钟", "三张地图", "整个港口", "空荡荡的剧院", "北方的公路"],
    ["在春天的早晨", "在河边", "非常仔细地", "暴风雨之后"],
]


def english(seed: int, sentences: int = 12) -> str:
    rng = random.Random(seed)
    words = (SUBJECTS, VERBS, OBJECTS, PLACES)
    return " ".join(" ".join(map(rng.choice, words)) + f", number {rng.randrange(10**6)}." for _ in range(sentences))


def chinese(seed: int, sentences: int = 12) -> str:
    rng = random.Random(seed)
    return "".join("".join(rng.choice(part) for part in (ZH[0], ZH[3], ZH[1], ZH[2])) + "。" for _ in range(sentences))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two sources, instructions and a validation file, with faults of every kind."""
    folder = tmp_path / "corpus"
    original = english(1000, 40)
    rows = [{"id": f"e{k}", "text": english(k)} for k in range(60)]
    rows += [{"id": "again", "text": english(3).upper().replace(" ", "  ")}]
    rows += [{"id": "original", "text": original}, {"id": "nearly", "text": original.replace("number", "No.", 1)}]
    rows += [{"id": "held-out", "text": english(5000)}, {"id": "short", "text": "Too little."}]
    rows += [{"id": "symbols", "text": "|=-+*#|" * 40 + " table of the words that one may read here " * 3}]
    rows += [{"id": "lines", "text": "Click here to read on about it now\n" * 30}]
    rows += [{"id": "french", "text": "Le conseil municipal a décidé hier soir de réparer le vieux pont de pierre. " * 2}]
    write_rows(folder / "web.jsonl", rows)
    write_rows(folder / "books-zh.jsonl", [{"id": f"z{k}", "text": chinese(k)} for k in range(50)])
    write_rows(
        folder / "chat.jsonl",
        [{"prompt": f"Say {k}.", "answer": f"{k}!"} for k in range(20)] + [{"prompt": "x", "answer": " "}],
    )
    write_rows(folder / "validation-web.jsonl", [{"id": f"v{k}", "text": english(5000 + k)} for k in range(5)])
    return folder


def small(**changes) -> Options:
    """Options with pieces so small that even a tiny corpus has many."""
    return Options(**{"piece_bytes": 8_000, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def source(report: dict, name: str) -> dict:
    return next(row for row in report["sources"] if row["name"] == name)


def test_what_is_dropped_is_counted_by_source_and_reason(corpus, tmp_path, tiny_tokenizer_path):
    report = prepare([corpus], tmp_path / "out", tiny_tokenizer_path, small(), workers=1)
    web = source(report, "web")
    assert {reason: counts["documents"] for reason, counts in web["dropped"].items()} == {
        "duplicate": 1,
        "near_duplicate": 1,
        "in_validation": 1,
        "too_short": 1,
        "few_letters": 1,
        "repeated_lines": 1,
        "other_language": 1,
    }
    assert web["kept"]["documents"] == web["read"]["documents"] - 7 == 61
    assert source(report, "chat")["dropped"]["empty"]["documents"] == 1
    assert source(report, "validation-web")["kept"]["documents"] == 5, "validation stays, the training document goes"
    samples = {sample["reason"]: sample for sample in report["dropped_samples"] if sample["source"] == "web"}
    assert samples["near_duplicate"]["id"] == "nearly" and samples["near_duplicate"]["repeats"]["id"] == "original"
    assert samples["duplicate"]["repeats"]["id"] == "e3" and samples["in_validation"]["repeats"]["source"] == "validation-web"
    assert samples["other_language"]["text"].startswith("Le conseil")


def test_the_shards_hold_the_kept_documents_in_order(corpus, tmp_path, tiny_tokenizer_path):
    report = prepare([corpus], tmp_path / "out", tiny_tokenizer_path, small(), workers=1)
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    shards = {shard.info.name: shard for shard in open_shards(tmp_path / "out", tiny_tokenizer_path)}
    assert sorted(shards) == ["books-zh", "chat", "validation-web", "web"]
    assert shards["books-zh"].info.language == "zh" and shards["chat"].info.kind == "instructions"
    texts = [tokenizer.decode(shards["books-zh"].document(k).tolist()) for k in range(50)]
    assert texts == [chinese(k) for k in range(50)]
    assert shards["web"].document(0)[-1] == tokenizer.special_tokens["eos"]
    assert [tokenizer.decode(shards["chat"].document(k).tolist()) for k in (2, 3)] == ["Say 1.", "1!"]
    for row in report["sources"]:
        info = shards[row["name"]].info
        assert (row["kept"]["tokens"], row["kept"]["bytes"]) == (info.tokens, info.bytes)
    assert not (tmp_path / "out" / "work").exists()


def test_the_number_of_processes_changes_nothing(corpus, tmp_path, tiny_tokenizer_path):
    prepare([corpus], tmp_path / "one", tiny_tokenizer_path, small(), workers=1)
    prepare([corpus], tmp_path / "three", tiny_tokenizer_path, small(), workers=3)
    prepare([corpus], tmp_path / "large", tiny_tokenizer_path, workers=1)
    one, three, large = (content(tmp_path / name) for name in ("one", "three", "large"))
    assert one == three
    del one["job.json"], large["job.json"]
    assert one == large, "nor does the size of the pieces"


def test_what_is_switched_off_is_off(corpus, tmp_path, tiny_tokenizer_path):
    options = small(clean=False, deduplicate=False, languages=())
    report = prepare([corpus], tmp_path / "out", tiny_tokenizer_path, options, workers=1)
    web = source(report, "web")
    assert web["dropped"] == {} and web["kept"]["documents"] == web["read"]["documents"]
    exact = prepare([corpus], tmp_path / "exact", tiny_tokenizer_path, small(similarity=1.0), workers=1)
    assert "near_duplicate" not in source(exact, "web")["dropped"] and source(exact, "web")["dropped"]["duplicate"]


SCRIPT = """
import sys
from openglm.data.pieces import Options
from openglm.data.prepare import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], sys.argv[3], Options(piece_bytes=20_000), workers=int(sys.argv[4]), log=print)
"""


def test_a_killed_run_goes_on_and_ends_alike(tmp_path, tiny_tokenizer_path):
    corpus = tmp_path / "corpus"
    for name in ("books", "web", "validation-web"):
        write_rows(corpus / f"{name}.jsonl", [{"text": english(len(name) + k, 60), "lang": "en"} for k in range(60)])
    prepare([corpus], tmp_path / "undisturbed", tiny_tokenizer_path, small(piece_bytes=20_000), workers=1)
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(corpus), str(out), str(tiny_tokenizer_path), "2"]
    for pieces in (2, 7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(out.glob("work/pieces/*.npz"))) < pieces and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was to be killed before its end"
        with pytest.raises(DataError, match="unfinished"):
            read_report(out)
        with pytest.raises(DataError, match="no token shards"):
            open_shards(out)
    (out / "work" / "pieces" / ".torn.npz.abc.part").write_bytes(b"half")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said.split(" pieces were there already")[0].split()[-1].replace(",", "")) >= 7
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_run_that_is_done_is_not_done_again(corpus, tmp_path, tiny_tokenizer_path):
    out = tmp_path / "out"
    first = prepare([corpus], out, tiny_tokenizer_path, small(), workers=1)
    before, said = {path: path.stat().st_mtime_ns for path in out.iterdir()}, []
    assert prepare([corpus], out, tiny_tokenizer_path, small(), workers=2, log=said.append) == first
    assert said == [f"`{out}` is already prepared"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_options_and_another_corpus_are_not_mixed_in(corpus, tmp_path, tiny_tokenizer_path, tiny_tokenizer):
    out = tmp_path / "out"
    prepare([corpus], out, tiny_tokenizer_path, small(), workers=1)
    before = content(out)
    with pytest.raises(DataError, match=r"another option `clean` \(true, now false\)"):
        prepare([corpus], out, tiny_tokenizer_path, small(clean=False), workers=1)
    with pytest.raises(DataError, match="another tokenizer"):
        prepare([corpus], out, tiny_tokenizer.save(tmp_path) and tmp_path / "unigram.model", small(), workers=1)
    write_rows(corpus / "web.jsonl", [{"text": english(77)}])
    with pytest.raises(DataError, match=r"another corpus \(`web.jsonl` differs\)"):
        prepare([corpus], out, tiny_tokenizer_path, small(), workers=1)
    assert content(out) == before
    report = prepare([corpus], out, tiny_tokenizer_path, small(), workers=1, fresh=True)
    assert source(report, "web")["read"]["documents"] == 1


def test_a_folder_with_something_else_in_it_is_left_alone(corpus, tmp_path, tiny_tokenizer_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear reader")
    for fresh in (False, True):
        with pytest.raises(StorageError, match="exists and is not empty"):
            prepare([corpus], tmp_path / "mine", tiny_tokenizer_path, workers=1, fresh=fresh)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_two_at_once_are_noticed(corpus, tmp_path, tiny_tokenizer_path):
    out, seen = tmp_path / "out", []

    def second(*_) -> None:
        with pytest.raises(StorageError, match="another process is preparing"):
            prepare([corpus], out, tiny_tokenizer_path, small(), workers=1)
        seen.append(True)

    prepare([corpus], out, tiny_tokenizer_path, small(), workers=1, watch=second)
    assert seen and len(open_shards(out)) == 4


def test_empty_and_emptied_corpora_leave_nothing_behind(tmp_path, tiny_tokenizer_path):
    out, file = tmp_path / "out", tmp_path / "corpus" / "a.jsonl"
    for rows, words in (([], "the corpus is empty"), ([{"text": "Too short."}] * 3, "dropped: too_short 3")):
        write_rows(file, rows)
        with pytest.raises(DataError, match=words):
            prepare([file], out, tiny_tokenizer_path, workers=1)
        assert not out.exists()
    file.write_text("\n\n\n")
    with pytest.raises(DataError, match="its files hold no document"):
        prepare([file], out, tiny_tokenizer_path, workers=1)
    assert not out.exists()


def test_rows_that_cannot_be_read(corpus, tmp_path, tiny_tokenizer_path):
    with open(corpus / "web.jsonl", "ab") as file:
        file.write(b'{"text": "torn\n{"title": "no text"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"web.jsonl` line \d+ is not valid JSON; mend it, or give --skip-bad"):
        prepare([corpus], tmp_path / "out", tiny_tokenizer_path, small(), workers=1)
    report = prepare([corpus], tmp_path / "out", tiny_tokenizer_path, small(), workers=1, skip_bad=True)
    assert source(report, "web")["dropped"]["unreadable"]["documents"] == 3


def test_languages_of_one_source_get_their_own_shards(tmp_path, tiny_tokenizer_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for k in range(6):
        (folder / f"{k}.txt").write_text((english if k % 2 else chinese)(k), encoding="utf-8")
    (folder / "validation-1.txt").write_text(english(99))
    prepare([folder], tmp_path / "out", tiny_tokenizer_path, workers=1)
    found = {shard.info.name: (shard.info.language, shard.info.documents) for shard in open_shards(tmp_path / "out")}
    assert found == {"notes-en": ("en", 3), "notes-zh": ("zh", 3), "validation-notes": ("en", 1)}
    assert [s["text"][:90] for s in kept_samples(tmp_path / "out", 1, "notes")] == [english(1)[:90], chinese(0)[:90]]


def test_output_of_datatrove_is_read(tmp_path, tiny_tokenizer_path):
    """Its JsonlWriter: `00000.jsonl.gz` with text, id and metadata, empty fields left out; languages as GlotLID has them."""
    for folder, make, label in (("en", english, "eng_Latn"), ("zh", chinese, "cmn_Hani")):
        for rank in range(2):
            metadata = {"language": label, "language_score": 0.97, "file_path": "s3://x/y.warc", "dump": "CC-MAIN"}
            rows = [{"text": make(10 * rank + k), "id": f"{rank}/{k}", "metadata": metadata} for k in range(4)]
            write_rows(tmp_path / "deduplicated" / folder / f"{rank:05d}.jsonl.gz", rows)
    folders = [tmp_path / "deduplicated" / name for name in ("en", "zh")]
    write_rows(folders[0] / "00002.jsonl.gz", [{"text": english(50), "id": "2/0", "metadata": {"language": "deu_Latn"}}])
    assert [each.source for each in plan_inputs(folders)] == ["en", "en", "en", "zh", "zh"]
    report = prepare(folders, tmp_path / "out", tiny_tokenizer_path, workers=1)
    assert {row["name"]: row["kept"]["documents"] for row in report["sources"]} == {"en": 8, "zh": 8}
    assert source(report, "en")["dropped"]["other_language"]["documents"] == 1, "what a row declares is believed"


def test_names_of_sources(tmp_path):
    for name in ("wiki-00000-of-00002.parquet", "wiki-00001-of-00002.parquet", "news-2019.jsonl", "news-2020.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [each.source for each in plan_inputs([tmp_path])] == [tmp_path.name, "news-2019", "news-2020", "wiki", "wiki"]
    assert [each.source for each in plan_inputs([tmp_path / "b.txt"])] == ["b"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "news-2019.jsonl").write_bytes(b"x")
    with pytest.raises(DataError, match="two sources are called `news-2019`"):
        plan_inputs([tmp_path, tmp_path / "sub"])
    with pytest.raises(DataError, match="given twice"):
        plan_inputs([tmp_path, tmp_path / "b.txt"])


def test_a_full_disk_ends_with_one_sentence_and_nothing_half_written(tmp_path, tiny_tokenizer_path):
    corpus = tmp_path / "corpus"
    # Languages are declared: py3langid unpacks its model into a temporary file, which the limit would hit first.
    write_rows(corpus / "more.jsonl", [{"text": english(10_000 + k, 60), "lang": "en"} for k in range(120)])
    out = tmp_path / "out"
    command = [GLM, "data", "prepare", corpus, "--tokenizer", tiny_tokenizer_path, "--out", out, "--workers", "1"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.rstrip().splitlines()[-1].startswith("error: cannot write"), done.stderr
    assert not (out / "shards.json").exists() and not list(out.rglob("*.part"))
    refuse("data", "inspect", out)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(open_shards(out)) == 1


def test_the_command_and_what_it_shows(corpus, tmp_path, tiny_tokenizer_path, monkeypatch):
    out = tmp_path / "out"
    shown = run("data", "prepare", corpus, "--tokenizer", tiny_tokenizer_path, "--out", out, "--workers", 1)
    assert "web" in shown.stdout and "near_duplicate: nearly the same text came before" in shown.stdout
    assert "glm train" in shown.stderr
    shown = run("data", "inspect", out, "--samples", 1, "--source", "web", "--verify").stdout
    assert (
        english(0)[:60] in shown and "books-zh" not in shown and "every checksum" in shown and "repeats web original" in shown
    )
    row = json.loads(run("data", "inspect", out, "--samples", 2, "--json").stdout)
    assert len(row["samples"]) == 8 and row["sources"] == read_report(out)["sources"]
    assert "has no source `wbe`" in refuse("data", "inspect", out, "--source", "wbe")
    for args, words in (
        (["--languages", "de"], "--languages"),
        (["--similarity", "2"], "--similarity"),
        (["--workers", "0"], "--workers"),
        (["--decontaminate", tmp_path / "nowhere"], "there is no folder"),
    ):
        said = refuse("data", "prepare", corpus, "--tokenizer", tiny_tokenizer_path, "--out", tmp_path / "new", *args)
        assert words in said and not (tmp_path / "new").exists()
    assert "no tokenizer" in refuse("data", "prepare", corpus, "--tokenizer", tmp_path / "x", "--out", tmp_path / "new")


def test_damaged_shards_are_found(corpus, tmp_path, tiny_tokenizer_path):
    out = tmp_path / "out"
    prepare([corpus], out, tiny_tokenizer_path, workers=1)
    for name in ("web.tokens", "web.offsets"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        assert f"{name}` is damaged" in refuse("data", "inspect", out, "--verify")
        (out / name).write_bytes(data)
    os.truncate(out / "web.offsets", 16)
    assert "web.offsets` holds" in refuse("data", "inspect", out)


def test_shards_from_before_are_shown(tiny_corpus, tmp_path, tiny_tokenizer_path):
    from openglm.data.shards import write_shards

    write_shards([tiny_corpus], tmp_path, tiny_tokenizer_path, workers=1)
    index = json.loads((tmp_path / "shards.json").read_text())
    for info in index["shards"]:
        del info["offsets_sha256"]
    (tmp_path / "shards.json").write_text(json.dumps(index))
    shown = run("data", "inspect", tmp_path, "--verify").stdout
    assert "chat" in shown and "every checksum" in shown
    assert "holds no tokenizer" in refuse("data", "inspect", tmp_path, "--samples", 1)
