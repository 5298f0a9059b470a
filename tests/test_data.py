"""From files to batches: what is read, what is refused, and samples that depend on nothing but their number."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import zstandard

from openglm.data.loader import Loader, Rows, make_batch, share_of
from openglm.data.mixture import Mixture, Objectives
from openglm.data.readers import read_documents, thin_out
from openglm.data.schedule import batch_size_at
from openglm.data.shards import check_sources, open_shards, write_shards
from openglm.errors import DataError
from openglm.infilling import NO_TARGET
from openglm.tokenizers import load_tokenizer


def test_every_kind_of_file_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "source": "s", "text": "one"}\n\n{"prompt": "p", "answer": "a"}\n')
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress('{"text": "二"}\n'.encode()))
    (tmp_path / "c.txt").write_text("three\nlines")
    found = list(read_documents([tmp_path]))
    assert [d.text for d in found] == ["one", "p", "二", "three\nlines"]
    assert [d.answer for d in found] == [None, "a", None, None]
    assert found[0].id == "x" and found[0].source == "s"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"text": "x"}\n{oops\n', "bad.jsonl` line 2 is not valid JSON"),
        ("bad.jsonl", b'{"title": "x"}\n', "line 1 has no `text`"),
        ("bad.jsonl", b'{"text": "\xff"}\n', "line 1 is not valid UTF-8"),
        ("bad.txt", b"\xff\xfe", "bad.txt` is not valid UTF-8"),
        ("bad.jsonl.zst", b"not zstd", "not valid zstd"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_documents([tmp_path / name]))


def test_sources_are_thinned_out_alike_each_time(tmp_path):
    for name in ("law", "tales"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(400)))
    first, second = ([d.text for d in thin_out([tmp_path], {"l*": 0.25, "tales": 1.0})] for _ in range(2))
    assert first == second
    assert sum("tales" in text for text in first) == 400
    assert 60 < sum("law" in text for text in first) < 140


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="there is no file or folder"):
        list(read_documents([tmp_path / "nowhere"]))
    with pytest.raises(DataError, match="no training text"):
        list(read_documents([tmp_path]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_corpus, tiny_tokenizer_path):
    folder = tmp_path_factory.mktemp("shards")
    write_shards([tiny_corpus], folder, tiny_tokenizer_path, workers=1)
    return open_shards(folder, tiny_tokenizer_path)


def test_shards_hold_the_documents(shards, tiny_corpus, tiny_tokenizer_path):
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    for shard in shards:
        documents = list(read_documents(tiny_corpus.glob(f"{shard.info.name}.*")))
        if shard.info.kind == "text":
            texts = [d.text for d in documents]
            assert all(shard.document(i)[-1] == tokenizer.special_tokens["eos"] for i in range(len(texts)))
        else:
            texts = [part for d in documents for part in (d.text, d.answer)]
        assert [tokenizer.decode(shard.document(i).tolist()) for i in range(shard.info.documents)] == texts
        assert shard.info.bytes == sum(len((text or "").encode()) for text in texts)
    assert {s.info.name: s.info.language for s in shards}["zh"] == "zh"
    assert {s.info.name: s.info.language for s in shards}["en"] == "en"


def test_damaged_and_foreign_shards_are_refused(tmp_path, tiny_corpus, tiny_tokenizer_path):
    write_shards([tiny_corpus], tmp_path, tiny_tokenizer_path, workers=1)
    foreign = tmp_path / "other.model"
    foreign.write_bytes(b"x")
    with pytest.raises(DataError, match="made by another tokenizer"):
        open_shards(tmp_path, foreign)
    (tmp_path / "en.tokens").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"en\.tokens` holds 2 tokens"):
        open_shards(tmp_path)
    (tmp_path / "shards.json").unlink()
    with pytest.raises(DataError, match="no token shards"):
        open_shards(tmp_path)


@pytest.fixture(scope="module")
def mixture(shards, tiny_tokenizer_path):
    objectives = Objectives(window=64, long_window=128, long_share=0.2, short_share=0.2, single_span_share=0.1)
    return Mixture(shards, load_tokenizer(tiny_tokenizer_path), objectives, seed=7, weights={"zh": 2.0})


def test_samples_depend_on_their_number_only(mixture):
    forwards = [mixture.sample(i) for i in range(50)]
    backwards = [mixture.sample(i) for i in reversed(range(50))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.layout.tokens.tolist() == b.layout.tokens.tolist()
        assert a.layout.targets.tolist() == b.layout.targets.tolist()
        assert (a.objective, a.language) == (b.objective, b.language)


def test_samples_fit_their_windows_and_have_the_right_shares(mixture):
    samples = [mixture.sample(i) for i in range(3000)]
    special = mixture.special
    for s in samples:
        tokens, targets = s.layout.tokens, s.layout.targets
        assert len(tokens) <= (128 if s.objective == "[gMASK]" else 64)
        assert (targets != NO_TARGET).any() and (targets[: s.layout.context] == NO_TARGET).all()
        mask = special["[MASK]"] if s.objective in ("[MASK]", "instruction") else special["[gMASK]"]
        assert (tokens[: s.layout.context] == mask).any()
        if s.objective == "[MASK]":  # an end of text is never masked, and closes part A as in inference
            assert special["eos"] not in targets and tokens[s.layout.context - 1] == special["eos"]
    text = [s for s in samples if s.objective != "instruction"]
    assert abs(np.mean([s.objective == "[gMASK]" for s in text]) - 0.7) < 0.04
    tokens = sum(len(s.layout) for s in samples)
    assert abs(sum(len(s.layout) for s in samples if s.objective == "instruction") / tokens - 0.05) < 0.015


def test_sentence_blanks_are_laid_out_as_the_spec_says_and_take_the_place_of_word_blanks(shards, tiny_tokenizer_path):
    def made(**changes) -> Mixture:
        objectives = Objectives(window=64, long_window=128, instruction_share=0.0, **changes)
        return Mixture(shards, load_tokenizer(tiny_tokenizer_path), objectives, seed=7)

    plain, mixed = made(), made(sentence_share=0.2)
    assert (plain.masks, mixed.masks) == (("[MASK]", "[gMASK]"), ("[MASK]", "[gMASK]", "[sMASK]"))
    special, shuffled, found = mixed.special, False, 0
    for number in range(800):
        sample, before = mixed.sample(number), plain.sample(number)
        layout = sample.layout
        if sample.objective != "[sMASK]":
            assert sample.objective == before.objective
            assert layout.tokens.tolist() == before.layout.tokens.tolist()
            continue
        found += 1
        assert before.objective == "[MASK]" and len(layout) <= 64
        part_a, part_b = np.split(layout.tokens, [layout.context])
        assert part_a[-1] == special["eos"] and not {special["[MASK]"], special["[gMASK]"]} & {*part_a}
        blanks = np.flatnonzero(part_a == special["[sMASK]"])
        opens = np.flatnonzero(part_b == special["sop"])
        spans = np.split(part_b, opens[1:])
        assert (layout.positions[: layout.context] == np.arange(layout.context)).all()
        places = layout.positions[layout.context :][opens]
        assert sorted(places) == blanks.tolist()  # each blank is filled once
        shuffled |= places.tolist() != blanks.tolist()
        assert layout.positions[layout.context :].tolist() == [p for p, span in zip(places, spans, strict=True) for _ in span]
        expected = [token for span in spans for token in (*span[1:], special["eop"])]
        assert layout.targets.tolist() == [NO_TARGET] * layout.context + expected
        for place, span in zip(places, spans, strict=True):
            assert mixed.ends[span[-1]] or place == layout.context - 2  # up to the end of a sentence, or of the text
            if place:  # from the end of another one, which may itself be blank, but is not, for blanks never touch
                assert mixed.ends[part_a[place - 1]]
    assert shuffled and found == pytest.approx(160, abs=35)


def test_a_text_of_one_sentence_has_blanks_of_words(tmp_path, tiny_tokenizer_path):
    (tmp_path / "text.jsonl").write_text('{"text": "The cat sat on the mat."}\n')
    write_shards([tmp_path], tmp_path / "out", tiny_tokenizer_path, workers=1)
    objectives = Objectives(generation_share=0.0, sentence_share=1.0)
    samples = Mixture(open_shards(tmp_path / "out"), load_tokenizer(tiny_tokenizer_path), objectives, seed=1)
    assert {samples.sample(i).objective for i in range(20)} == {"[MASK]"}


def test_a_causal_twin_reads_the_same_text_as_plain_language_modelling(mixture, shards, tiny_tokenizer_path):
    objectives = dataclasses.replace(mixture.objectives, unidirectional=True)
    twin = Mixture(shards, load_tokenizer(tiny_tokenizer_path), objectives, seed=7, weights={"zh": 2.0})
    special = twin.special
    for sample in (twin.sample(i) for i in range(300)):
        layout = sample.layout
        assert layout.tokens[:2].tolist() == [special["[gMASK]"], special["sop"]] and layout.context == 1
        # Every token of the text is a target, from the one before it.
        assert (layout.targets[1:] != NO_TARGET).all()
        assert layout.targets[1:-1].tolist() == layout.tokens[2:].tolist()
        if sample.objective == "instruction" and len(layout) < 63:
            assert layout.targets[-1] == special["eos"]
    # The same documents in the same order: where both are cut alike, the twin reads all that the other does.
    pairs = [(twin.sample(i), mixture.sample(i)) for i in range(300)]
    assert all(a.source == b.source and (a.objective == "instruction") == (b.objective == "instruction") for a, b in pairs)
    alike = [(a, b) for a, b in pairs if b.objective == "[gMASK]"]
    for a, b in alike:
        text = [*b.layout.tokens[: b.layout.context - 1], *b.layout.targets[b.layout.context :]]
        assert a.layout.targets[1:].tolist() == text


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_batches_of_a_ramp_are_the_same_on_any_number_of_ranks(mixture, ranks):
    """Token ids, not losses: the shares in the order of the ranks are the batch in the order of the samples."""

    def batches(ranks: int, start: int) -> dict[int, tuple[list, int, int]]:
        loaders = [Loader(mixture, Rows(256, 128), rank, ranks) for rank in range(ranks)]
        found, first = {}, start
        while first < 44:
            size = batch_size_at(8, (4, 2, 24), first)
            following = (first + size, batch_size_at(8, (4, 2, 24), first + size))
            shares = [loader.batch(first, size, following) for loader in loaders]
            tokens = []
            for share in shares:
                own = {}
                for micro in share.micro_batches:
                    for place, sample in enumerate(micro.samples):
                        mine = torch.from_numpy(micro.owners == place)
                        own[id(sample)] = (micro.batch.tokens[mine].tolist(), micro.batch.targets[mine].tolist())
                tokens.append(sorted(own.values()))
            found[first] = (tokens, sum(share.tokens for share in shares), sum(share.targets for share in shares))
            first += size
        for loader in loaders:
            loader.close()
        return found

    alone, shared = batches(1, 0), batches(ranks, 0)
    assert list(alone) == list(shared) == [0, 4, 8, 12, 18, 24, 32, 40]
    for first, (tokens, *counts) in alone.items():
        size = batch_size_at(8, (4, 2, 24), first)
        assert counts == list(shared[first][1:])
        assert sorted(sample for share in shared[first][0] for sample in share) == tokens[0]
        numbers = [list(share_of(first, size, rank, ranks)) for rank in range(ranks)]
        assert [n for part in numbers for n in part] == list(range(first, first + size))
        assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
        for part, share in zip(numbers, shared[first][0], strict=True):
            layouts = [mixture.sample(number).layout for number in part]
            assert share == sorted((layout.tokens.tolist(), layout.targets.tolist()) for layout in layouts)
    # A run that goes on at sample 18, in the middle of the ramp, on other ranks.
    assert batches(ranks, 18) == {first: found for first, found in shared.items() if first >= 18}


def test_a_batch_holds_each_of_its_samples_once(mixture):
    batch = make_batch(mixture, 20, 24, Rows(256))
    expected = sorted(tuple(mixture.sample(20 + i).layout.tokens.tolist()) for i in range(24))
    found = []
    targets = 0
    for micro in batch.micro_batches:
        b = micro.batch
        assert b.tokens.numel() <= 256 or len(b.tokens) == 1
        targets += int((b.targets != NO_TARGET).sum())
        found += [tuple(row[valid].tolist()) for row, valid in zip(b.tokens, b.valid, strict=True)]
    assert sorted(found) == expected
    assert batch.targets == targets and batch.tokens == sum(map(len, expected))


def test_empty_files_and_tiny_documents(tmp_path, tiny_tokenizer_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "tiny.jsonl").write_text('{"text": "a"}\n' * 3)
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    write_shards([tmp_path], tmp_path / "out", tiny_tokenizer_path, workers=1)
    with pytest.raises(DataError, match="no document of 4 tokens"):
        Mixture(open_shards(tmp_path / "out"), tokenizer, Objectives(), seed=1)
    (tmp_path / "text.jsonl").write_text('{"text": "The cat sat on the mat."}\n')
    write_shards([tmp_path], tmp_path / "more", tiny_tokenizer_path, workers=1)
    samples = Mixture(open_shards(tmp_path / "more"), tokenizer, Objectives(), seed=1)
    assert all(len(samples.sample(i).layout) >= 4 for i in range(20))


def test_instructions_and_text_in_one_file_are_refused(tmp_path, tiny_tokenizer_path):
    rows = [{"text": "plain"}, {"text": "and more"}, {"prompt": "p", "answer": "a"}]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="mixes instructions"):
        write_shards([tmp_path], tmp_path / "out", tiny_tokenizer_path, workers=1)


def test_changed_text_is_noticed(tmp_path, tiny_tokenizer_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    write_shards([tmp_path / "a.jsonl"], tmp_path / "out", tiny_tokenizer_path, workers=1)
    check_sources([tmp_path / "a.jsonl"], tmp_path / "out")
    (tmp_path / "a.jsonl").write_text('{"text": "one more"}\n')
    with pytest.raises(DataError, match="has changed since the shards"):
        check_sources([tmp_path / "a.jsonl"], tmp_path / "out")


def test_sources_follow_their_weights_schedules_and_caps(shards, tiny_tokenizer_path):
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    texts = [s for s in shards if not s.info.name.startswith("validation")]

    def shares(numbers: range, share=0.05, **settings) -> dict[str, float]:
        objectives = Objectives(window=64, long_window=64, instruction_share=share)
        mixture = Mixture(texts, tokenizer, objectives, seed=3, **settings)
        drawn = [mixture.sample(n).source for n in numbers]
        return {name: drawn.count(name) / len(drawn) for name in ("en", "zh", "chat")}

    sizes = {s.info.name: s.info.tokens for s in texts}
    plain = shares(range(1500), share=0.0)
    assert plain["en"] == pytest.approx(sizes["en"] / (sizes["en"] + sizes["zh"]), abs=0.04) and plain["chat"] == 0
    # A weight that goes from English to Chinese, and instructions that begin later.
    turning = {"en": ((0.0, 1.0), (1000.0, 1.0), (1001.0, 0.0)), "zh": ((0.0, 0.0), (1000.0, 0.0), (1001.0, 1.0))}
    later = ((0.0, 0.0), (1000.0, 0.0), (1001.0, 0.5))
    before, behind = (shares(numbers, share=later, weights=turning) for numbers in (range(300), range(2000, 2600)))
    assert before["en"] == 1.0 and behind["en"] == 0.0 and behind["chat"] > 0.3
    # A cap of a tenth of the documents is a tenth of the size.
    documents = next(s.info.documents for s in texts if s.info.name == "zh")
    capped = shares(range(1500), share=0.0, caps={"zh": documents // 10})
    small = sizes["zh"] * (documents // 10) / documents
    assert capped["zh"] == pytest.approx(small / (sizes["en"] + small), abs=0.03)
