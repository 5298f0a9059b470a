"""The measures of the bundled model: the n-gram model it is compared with, and the fixed blanks; and what is timed."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_network import SMALL, random_state

from openglm import GLM, load_tokenizer
from openglm.data.readers import read_documents
from openglm.data.shards import open_shards, write_shards

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
END = 0


def load_script(name: str):
    """A benchmark as a module; benchmarks are scripts, not a package, and find header.py beside them."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ngram = load_script("ngram")
bundled = load_script("bundled_model")


# ---------------------------------------------------------------------------------------------------------------------
# Kneser-Ney


class Twin:
    """The same formula with dictionaries."""

    def __init__(self, documents, vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        occurring = {
            n: Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)) for n in range(1, order + 1)
        }
        self.counts = {order: occurring[order]}
        for n in range(1, order):
            before = defaultdict(set)
            for gram in occurring[n + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(words) for gram, words in before.items()})
        self.discounts = {}
        for n, counts in self.counts.items():
            sizes = Counter(counts.values())
            self.discounts[n] = ngram.estimate_discounts([sizes[k] for k in (1, 2, 3, 4)])

    def p(self, word: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        lower = self.p(word, context[1:]) if context else 1 / (self.vocab_size - 1)
        followers = [c for gram, c in self.counts[n].items() if gram[:-1] == context]
        if not followers:
            return lower
        total = sum(followers)
        left = sum(self.discounts[n][min(c, 3) - 1] for c in followers)
        count = self.counts[n][(*context, word)]
        own = count - self.discounts[n][min(count, 3) - 1] if count else 0.0
        return own / total + left / total * lower


def toy_documents(seed: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size - 1)  # the last id never occurs
    ids = np.arange(1, vocab_size - 1)
    documents = [rng.choice(ids, size=rng.integers(1, 40), p=weights / weights.sum()).tolist() for _ in range(25)]
    return documents + documents[:4]  # so that long n-grams occur twice


def closed(documents) -> np.ndarray:
    return np.asarray([token for d in documents for token in [*d, END]], dtype=np.uint16)


@pytest.mark.parametrize(("seed", "vocab_size", "order"), [(0, 9, 5), (1, 12, 3), (2, 5, 2), (3, 30, 5), (4, 9, 1)])
def test_ngram_equals_a_twin_of_dictionaries(seed, vocab_size, order):
    documents = toy_documents(seed, vocab_size)
    model = ngram.KneserNey(closed(documents), vocab_size, END, order)
    if order == 1:  # the highest order counts occurrences
        assert model.tables[0].counts.sum() == sum(map(len, documents))
    twin = Twin(documents, vocab_size, order)
    text = [*toy_documents(seed + 100, vocab_size)[:8], [vocab_size - 1, 1, vocab_size - 1, 1, 2], documents[0]]
    found = model.probabilities(closed(text))
    expected = [[twin.p(word, tuple(d[max(0, i - order + 1) : i])) for i, word in enumerate(d)] + [np.nan] for d in text]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-12)


def test_ngram_probabilities_sum_to_one():
    documents = toy_documents(7, 9)
    model = ngram.KneserNey(closed(documents), 9, END)
    seen = [tuple(documents[1][k : k + 4]) for k in range(5)]
    unseen = [(8, 8, 8, 8), (1, 8, 1, 1), (8,), (1, 1, 1, 8), (7, 7, 7, 7)]
    short = [(), (1,), (1, 2), (3, 1, 2)]
    for context in itertools.chain(seen, unseen, short):
        p = model.probabilities(closed([[*context, word] for word in range(1, 9)]))
        last = p[len(context) :: len(context) + 2]
        assert (last > 0).all() and last.sum() == pytest.approx(1, abs=1e-12), context


def test_ngram_documents_shorter_than_the_order():
    model = ngram.KneserNey(closed([[1, 2], [1, 3], [2]]), 5, END)
    p = model.probabilities(closed([[1, word] for word in range(1, 5)]))[1::3]
    assert p.sum() == pytest.approx(1)
    assert p[1] == p[2] > p[3]


def test_ngram_training_text_and_windows(tmp_path, tiny_corpus, tiny_tokenizer_path, monkeypatch, capsys):
    write_shards([tiny_corpus], tmp_path / "shards", tiny_tokenizer_path, workers=1)
    shards = {shard.info.name: shard for shard in open_shards(tmp_path / "shards")}
    chat = shards["chat"]
    tokens = ngram.training_tokens([chat], 2)
    first = [*chat.document(0), *chat.document(1), 2]
    assert tokens[: len(first)].tolist() == first
    assert (tokens == 2).sum() == chat.info.documents / 2 and tokens[-1] == 2
    windows = ngram.window_tokens(shards["validation-en"], 7, 2)
    assert np.diff(np.flatnonzero(windows == 2)).max() == 8
    assert (windows != 2).sum() == shards["validation-en"].info.tokens - shards["validation-en"].info.documents

    monkeypatch.setattr(
        sys,
        "argv",
        f"ngram.py --shards {tmp_path}/shards --tokenizer {tiny_tokenizer_path} --json {tmp_path}/x.json".split(),
    )
    assert ngram.main() == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["training"]["shards"] == ["en", "zh"]
    assert set(report["validation"]) == {"validation-en", "validation-zh"}
    bits = report["validation"]["validation-en"]["bits_per_byte"]
    assert 0.1 < bits < 1.5 and f"| {bits:.4f} |" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Blanks and the card


@pytest.fixture(scope="module")
def documents(tiny_corpus):
    return {name: list(read_documents([tiny_corpus / f"validation-{name}.jsonl"])) for name in ("en", "zh")}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path):
    return load_tokenizer(tiny_tokenizer_path)


def test_sentences_are_the_whole_text():
    text = "Mr. Fox came in. “Who?” he said…\nNobody!  Then 3.5 of them left. 你好。“走吧！”他说。\n\n完了"
    expected = [
        "Mr. Fox came in. ",
        "“Who?” ",
        "he said…\n",
        "Nobody!  ",
        "Then 3.5 of them left. ",
        "你好。",
        "“走吧！”",
        "他说。\n\n",
        "完了",
    ]
    assert bundled.split_sentences(text) == expected
    assert "".join(expected) == text


def test_blanks_are_fixed_and_as_described(documents, tokenizer):
    blanks = bundled.draw_blanks(documents, tokenizer, 12)
    assert [blank.language for blank in blanks] == ["en"] * 12 + ["zh"] * 12
    assert bundled.draw_blanks(documents, tokenizer, 12) == blanks
    other = bundled.draw_blanks(documents, tokenizer, 12, seed=1)
    assert bundled.fingerprint(other) != bundled.fingerprint(blanks) == bundled.fingerprint(list(blanks))
    special = tokenizer.special_tokens
    for blank in blanks:
        assert blank.part_a[-1] == special["eos"] and blank.part_a.count(special["[MASK]"]) == 1
        assert blank.part_a[blank.index] == special["[MASK]"]
        assert 1 <= len(blank.answer) <= 8
        whole = [*blank.part_a[: blank.index], *blank.answer, *blank.part_a[blank.index + 1 : -1]]
        assert 32 <= len(whole) <= 96
        text = tokenizer.decode(whole)
        assert tokenizer.encode(text) == whole
        assert any(text in document.text for document in documents[blank.language])
        assert blank.language == "zh" or tokenizer.decode(blank.answer).startswith(" ")


def test_span_lengths_follow_poisson():
    draws = bundled.Draws(0)
    found = np.bincount([draws.span() for _ in range(20_000)], minlength=9) / 20_000
    weights = np.asarray([0, *[3**k / math.factorial(k) for k in range(1, 9)]])
    assert np.abs(found - weights / weights.sum()).max() < 0.012


def test_exact_means_the_same_text_and_an_end(tokenizer):
    answer = tokenizer.encode(" sat on")
    blank = bundled.Blank("en", "made", [], 0, answer)
    spelled = [tokenizer.encode(c)[0] for c in " sat on"]
    assert bundled.is_exact(blank, answer, True, tokenizer)
    assert bundled.is_exact(blank, spelled, True, tokenizer) and spelled != answer
    assert not bundled.is_exact(blank, answer, False, tokenizer)
    assert not bundled.is_exact(blank, answer[:-1], True, tokenizer)
    assert not bundled.is_exact(blank, tokenizer.encode("sat on"), True, tokenizer)


def test_measures_of_a_small_model(documents, tokenizer):
    config = dataclasses.replace(SMALL, vocab_size=640, max_sequence_length=640, special_tokens=dict(tokenizer.special_tokens))
    glm = GLM.from_state(config, random_state(config, 0), tokenizer=tokenizer)
    report, card = bundled.run(glm, documents, blanks=8)
    counts = report["blanks"]
    assert counts["by_language"]["all"]["blanks"] == sum(row["blanks"] for row in counts["by_span_length"].values()) == 16
    blanks = bundled.draw_blanks(documents, tokenizer, 8)
    assert counts["sha256"] == bundled.fingerprint(blanks)
    # A batch writes what each prompt writes alone.
    answers = list(bundled.fill_blanks(glm, blanks))
    assert answers == [next(bundled.fill_blanks(glm, [blank])) for blank in blanks]
    assert all(len(answer) <= 16 for answer, _ in answers)
    # Random weights know nothing: more bits than a uniform choice among the pieces takes, on the average.
    for language, found in documents.items():
        tokens, size = (
            sum(map(len, parts)) for parts in zip(*((tokenizer.encode(d.text), d.text.encode()) for d in found), strict=True)
        )
        assert report["bits_per_byte"][language] > 0.9 * tokens * math.log2(640) / size
    rows = [line for line in card.splitlines() if line.endswith(("| yes |", "| no |"))]
    assert [row.split()[1] for row in rows] == ["English"] * 6 + ["Chinese"] * 6
    assert all(row.count("`[MASK]`") == 1 for row in rows)
    assert len([line for line in card.splitlines() if line.startswith("> <b>")]) == 6


def test_with_the_left_side_only_nothing_behind_a_blank_matters(documents, tokenizer):
    config = dataclasses.replace(SMALL, vocab_size=640, max_sequence_length=640, special_tokens=dict(tokenizer.special_tokens))
    glm = GLM.from_state(config, random_state(config, 0), tokenizer=tokenizer)
    blanks = bundled.draw_blanks(documents, tokenizer, 4)
    cut = [dataclasses.replace(blank, part_a=[*blank.part_a[: blank.index + 1], blank.part_a[-1]]) for blank in blanks]
    answers = list(bundled.fill_blanks(glm, blanks, left_only=True))
    assert answers == list(bundled.fill_blanks(glm, cut, left_only=True))
    # As many tokens as are missing, unless the model ends before.
    assert all(len(answer) <= len(blank.answer) and ended for blank, (answer, ended) in zip(blanks, answers, strict=True))
    assert any(len(answer) == len(blank.answer) for blank, (answer, _) in zip(blanks, answers, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def test_what_is_timed_beside_blank_masks_computes_as_much():
    training = load_script("training")
    config = training.shape("tiny", 64)
    blanks = training.blanks(config, 2, 64)
    causal = training.Batch.stack(training.causal(config, blanks))
    packed = training.Batch.aggregate(training.aggregated(config, blanks, 4), 64)
    targets = [int((batch.targets >= 0).sum()) for batch in (training.Batch.stack(blanks), causal, packed)]
    assert len(set(targets)) == 1 and causal.tokens.shape == packed.tokens.shape == (2, 64)
    # Without a mask and by the causal kernel: the same losses as through the mask that says so.
    network = training.GLM130B(config).initialize(0)
    masked, plain = (
        training.Ours(copy.deepcopy(network), "float32", causal, training.Variant("", rows)).model
        for rows in ("blanks", "causal")
    )
    expected = masked.losses(causal)
    causal.mask.fill_(True)
    torch.testing.assert_close(plain.losses(causal), expected)
    assert not torch.allclose(masked.losses(causal), expected)
