"""Text in, text out, on a small random model with a real tokenizer."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from test_network import random_state

import openglm
from openglm import bundled
from openglm.checkpoints import save_checkpoint
from openglm.config import ModelConfig
from openglm.errors import InputError, ModelNotFoundError, TokenizerError, UnlearnedMaskError
from openglm.inference.loading import check_type
from openglm.inference.sampling import SamplingSettings, make_generator
from openglm.inference.writing import Answer, Draft
from openglm.infilling import Batch, blank_sample, encode_text
from openglm.models.glm130b import GLM130B
from openglm.tokenizers import load_tokenizer

TEXTS = [
    "The cat [MASK] on the mat.",
    "小猫[MASK]，然后下雨了。",
    "Once upon a time",
    "Nobody [sMASK] the king [MASK] his hat, and then [gMASK]",
    "[MASK]",
]


@pytest.fixture(scope="module")
def config():
    return ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, inner_hidden_size=48, vocab_size=608, max_sequence_length=96
    )


@pytest.fixture(scope="module")
def state(config):
    state = random_state(config, 11)
    bias = state["transformer.final_layernorm.bias"]
    # It likes to write words and to end, and would love to write masks.
    state["transformer.word_embeddings.weight"] *= 1.5
    for token, push in ((8, 0.7), (3, 5.0), (7, 5.0), (605, 5.0)):
        state["transformer.word_embeddings.weight"][token] += push * bias / bias.norm()
    return state


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path):
    return load_tokenizer(tiny_tokenizer_path)


@pytest.fixture(scope="module")
def glm(config, state, tokenizer):
    return openglm.GLM.from_state(config, state, tokenizer=tokenizer)


def test_text_outside_the_blanks_is_untouched(glm):
    for text in TEXTS:
        result = glm.fill(text, max_tokens=8)
        pieces = re.split(r"\[s?g?MASK\]", text)
        if len(pieces) == 1:
            pieces.append("")
        assert len(result.spans) == len(pieces) - 1
        rebuilt = pieces[0] + "".join(span.text + piece for span, piece in zip(result.spans, pieces[1:], strict=True))
        assert result.text == rebuilt
        for span in result.spans:
            assert result.text[span.start : span.end] == span.text
            assert len(span.log_probabilities) == len(span.token_ids) <= 8
            assert all(value <= 0 for value in span.log_probabilities)
            assert not {3, 4, 5, 7, 0, 605} & set(span.token_ids)


def test_answers_are_those_of_the_network(glm, tokenizer):
    """Greedy by hand: the whole sequence anew for every token, in the layout of training."""
    text = "The cat [MASK] on [MASK] the mat."
    result = glm.fill(text, max_tokens=6)
    part_a = encode_text(text, tokenizer)
    for span in result.spans:
        index = part_a.index(3)
        written: list[int] = []
        logs: list[float] = []
        while len(written) < 6:
            tokens = [*part_a[:index], *written, 77, *part_a[index + 1 :]]
            layout = blank_sample(tokens, [index], [len(written) + 1], glm.config.special_tokens)
            batch = Batch.stack([dataclasses.replace(layout, targets=None)])
            row = len(part_a) + len(written)
            scores = glm.network(batch.tokens, batch.positions, batch.mask)[0, row].log_softmax(-1)
            allowed = scores.clone()
            allowed[[0, 1, 3, 4, 5, 6, 7, 9, 10, *range(600, 608)]] = -torch.inf
            token = int(allowed.argmax())
            if token in (2, 8):
                break
            written.append(token)
            logs.append(float(scores[token]))
        assert list(span.token_ids) == written
        assert span.log_probabilities == pytest.approx(logs, abs=1e-4)
        assert span.finish_reason == ("length" if len(written) == 6 else "end")
        part_a = [*part_a[:index], *written, *part_a[index + 1 :]]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}, {"num_beams": 3}, {"repetition_penalty": 1.5}]
)
def test_a_batch_equals_its_texts(glm, options):
    alone = [glm.fill(text, max_tokens=7, **options) for text in TEXTS]
    for batch_size in (2, 5):
        together = glm.fill_batch(TEXTS, batch_size=batch_size, max_tokens=7, **options)
        for one, other in zip(alone, together, strict=True):
            assert one.text == other.text
            assert [span.token_ids for span in one.spans] == [span.token_ids for span in other.spans]
            for a, b in zip(one.spans, other.spans, strict=True):
                assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-4)
    assert glm.fill_batch([]) == []


def test_seeds(glm):
    def write(seed: int | None) -> str:
        return glm.generate("Once upon a time", temperature=1.5, max_tokens=12, seed=seed).answer

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(5)}) == 5
    assert len({write(None) for _ in range(5)}) > 1
    before = torch.get_rng_state()
    write(None)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random state is its own


def test_generate_continues_a_text_or_fills_its_blank(glm):
    result = glm.generate("Once upon a time", max_tokens=6)
    assert result.text == "Once upon a time" + result.answer
    assert result == glm.generate_batch(["Once upon a time"], max_tokens=6)[0]
    assert glm.generate("The cat [MASK] on the mat.", max_tokens=6).text.startswith("The cat ")
    assert result.text == glm.fill("Once upon a time[gMASK]", max_tokens=6).text
    with pytest.raises(InputError, match="one blank at most"):
        glm.generate("a [MASK] b [MASK]")


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3}, {"num_beams": 2}])
def test_streaming_equals_not_streaming(glm, options):
    for text in ("Once upon a time", "小猫[MASK]，然后下雨了。", "The cat [MASK] on the mat."):
        whole = glm.generate(text, max_tokens=30, **options).answer
        pieces = list(glm.stream(text, max_tokens=30, **options))
        assert "".join(pieces) == whole
        assert "" not in pieces
        if len(whole) > 8 and "num_beams" not in options:
            assert len(pieces) > 1


def test_stop_strings(glm):
    options = {"temperature": 2.0, "seed": 3, "max_tokens": 40}
    whole = glm.generate("Once upon a time", **options).answer
    assert len(whole) > 12
    for start, length in ((0, 1), (5, 1), (5, 4), (7, 5)):
        stop = whole[start : start + length]
        expected = whole[: whole.index(stop)]
        result = glm.generate("Once upon a time", stop=(stop, "never written"), **options)
        assert (result.answer, result.finish_reason) == (expected, "stop")
        assert "".join(glm.stream("Once upon a time", stop=stop, **options)) == expected
    assert glm.generate("Once upon a time", stop=whole + "x", **options).answer == whole


class Letters:
    """A tokenizer of letters, to hold answers to what is said of them."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    class Stream:
        def push(self, token: int) -> str:
            return chr(token)

        def flush(self) -> str:
            return ""

    def stream(self) -> Letters.Stream:
        return self.Stream()


def answer_of(text: str, stop: tuple[str, ...] = (), before: str = "x") -> tuple[list[str], Answer]:
    answer = Answer(Letters(), stop, before)  # pyright: ignore[reportArgumentType]
    pieces = []
    for letter in text:
        if not answer.finished:
            pieces.append(answer.push(ord(letter), -1.0, False))
    return [*pieces, answer.flush()], answer


def test_a_stopped_answer_brings_its_blank_along(tokenizer):
    # The next blank sees "The king had a hat", not "The kinghad a hat".
    text = "The king [MASK] a hat [MASK]."
    draft = Draft(text, encode_text(text, tokenizer), tokenizer, make_generator(0))
    answer = Answer(tokenizer, ("!",), draft.before)
    for token in tokenizer.encode(" had!"):
        if not answer.finished:
            answer.push(token, -1.0, False)
    draft.place(answer, "[MASK]", draft.mask_index(tokenizer.special_tokens))
    assert (answer.text, answer.finish_reason) == ("had", "stop")
    assert tokenizer.decode(draft.ids) == "The king had a hat."


def test_what_may_begin_a_stop_string_is_held_back():
    pieces, answer = answer_of("ababac!", stop=("abac",))
    assert pieces == ["", "", "", "ab", "", "", ""]
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("ab", "stop", 6)
    pieces, answer = answer_of("aba", stop=("abac",))
    assert pieces == ["", "", "", "aba"] and answer.text == "aba"
    assert answer_of("xaby", stop=("ab", "b"))[1].text == "x"
    assert answer_of("xaby", stop=("aby", "b"))[1].text == "xa"


def test_the_leading_blank_of_an_answer_is_dropped_where_the_text_has_one():
    assert answer_of(" Paris", before="is ")[1].text == "Paris"
    assert answer_of(" Paris", before="is")[1].text == " Paris"
    assert answer_of("  Paris", before="")[1].text == " Paris"
    assert answer_of(" Paris", stop=(" ",), before="is ")[1].text == "Paris"


def test_length_limits(glm):
    for least in (1, 5, 12):
        for options in ({}, {"num_beams": 2}, {"temperature": 1.0, "seed": 0}):
            result = glm.generate("Once upon a time", min_tokens=least, max_tokens=12, **options)
            assert least <= len(result.token_ids) <= 12
    assert glm.generate("Once upon a time", min_tokens=12, max_tokens=12).finish_reason == "length"
    # The context ends the answer where max_tokens does not.
    length = len(encode_text("Once upon a time", glm.tokenizer)) + 1
    result = glm.generate("Once upon a time", min_tokens=90, max_tokens=500)
    assert (len(result.token_ids), result.finish_reason) == (96 - length, "length")


def test_a_full_context_leaves_later_blanks_their_token(glm):
    text = "[MASK] " + "cat " * 40 + "[MASK] [MASK]."
    result = glm.fill(text, min_tokens=80, max_tokens=80)
    assert [len(span.token_ids) for span in result.spans][1:] == [1, 1]


def test_no_repeated_runs(glm):
    for n in (2, 3):
        ids = glm.generate("Once upon a time", num_beams=2, no_repeat_ngram_size=n, min_tokens=40, max_tokens=40).token_ids
        runs = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        assert len(runs) == len(set(runs))


def test_a_strong_penalty_keeps_tokens_from_coming_back(glm):
    ids = glm.generate("Once upon a time", repetition_penalty=1000.0, min_tokens=30, max_tokens=30).token_ids
    assert len(set(ids)) == len(ids)


def test_scores_equal_each_choice_alone(glm, tokenizer):
    for context, choices in (
        ("The cat [MASK] on the mat.", ["sat", "looked at the garden", "wrote about"]),
        ("Once upon a time", [" there was a king", " nobody"]),
        ("小猫[MASK]。", ["坐在垫子", "看着一条河"]),
    ):
        result = glm.score(context, choices)
        ids = encode_text(context, tokenizer)
        mask = 4 if 4 in ids else 3
        index = ids.index(mask)
        for choice, found in zip(choices, result.choices, strict=True):
            answer = tokenizer.encode((" " if " [MASK]" in context else "") + choice)
            tokens = [*ids[:index], *answer, *ids[index + 1 :]]
            kind = "[gMASK]" if mask == 4 else "[MASK]"
            layout = blank_sample(tokens, [index], [len(answer)], glm.config.special_tokens, kind=kind)
            if kind == "[gMASK]":  # its positions run on
                layout.positions[len(ids) :] = range(len(ids), len(layout))
            batch = Batch.stack([layout])
            logs = glm.network(batch.tokens, batch.positions, batch.mask)[0].log_softmax(-1)
            expected = [float(logs[len(ids) + k, token]) for k, token in enumerate(answer)]
            assert found.text == choice and found.tokens == len(answer)
            assert found.token_log_probabilities == pytest.approx(expected, abs=1e-4)
            assert found.log_probability == pytest.approx(sum(expected), abs=1e-3)
        assert result.best == max(range(len(choices)), key=lambda i: result.choices[i].log_probability)


def test_many_choices_score_as_few_do(glm):
    choices = [f"the cat sat on the mat in the morning {n}" for n in range(60)]
    many = glm.score("Nobody [MASK].", choices)
    for n in (0, 31, 59):
        alone = glm.score("Nobody [MASK].", [choices[n]]).choices[0]
        assert many.choices[n].token_log_probabilities == pytest.approx(alone.token_log_probabilities, abs=1e-4)
    single = glm.score("Nobody [MASK].", ["a", "b", "c"])  # one token each: they share a row
    alone = glm.score("Nobody [MASK].", ["b"]).choices[0]
    assert single.choices[1].log_probability == pytest.approx(alone.log_probability, abs=1e-4)


def test_results_become_json(glm):
    for result in (glm.fill(TEXTS[0]), glm.generate(TEXTS[2], max_tokens=3), glm.score(TEXTS[0], ["a", "b"])):
        assert json.loads(json.dumps(result.to_dict())) == json.loads(json.dumps(dataclasses.asdict(result)))
    assert set(glm.fill(TEXTS[0]).to_dict()["spans"][0]) == {
        "text", "token_ids", "log_probabilities", "finish_reason", "kind", "start", "end"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda glm: glm.fill(""), "the text is empty"),
        (lambda glm: glm.fill(" \n"), "the text is empty"),
        (lambda glm: glm.fill("cat " * 200 + "[MASK]"), r"takes \d+ tokens.*context of 96"),
        (lambda glm: glm.fill_batch(["a [MASK]", ""]), "text 2: the text is empty"),
        (lambda glm: glm.fill_batch("a [MASK]"), "list of texts"),
        (lambda glm: glm.fill("a [MASK]", num_beams=0), "`num_beams`.*0"),
        (lambda glm: glm.fill("a [MASK]", temperature=-1.0), "`temperature`.*-1.0"),
        (lambda glm: glm.fill("a [MASK]", top_p=1.5), "`top_p`.*1.5"),
        (lambda glm: glm.fill("a [MASK]", top_k=-1), "`top_k`.*-1"),
        (lambda glm: glm.fill("a [MASK]", max_tokens=0), "`max_tokens`.*0"),
        (lambda glm: glm.fill("a [MASK]", min_tokens=9, max_tokens=8), "`min_tokens`.*9"),
        (lambda glm: glm.fill("a [MASK]", stop=("",)), "`stop`"),
        (lambda glm: glm.fill("a [MASK]", top_pp=0.5), "top_pp"),
        (lambda glm: glm.fill("a [MASK]", temperature="hot"), "`temperature`.*'hot'"),
        (lambda glm: glm.fill("a \ud800 [MASK]"), "Unicode"),
        (lambda glm: glm.stream("a [MASK] b [MASK]"), "one blank"),
        (lambda glm: glm.score("a [MASK]", []), "choices"),
        (lambda glm: glm.score("a [MASK]", ["b", ""]), "empty"),
        (lambda glm: glm.score("a [MASK]", [3]), "choices"),
        (lambda glm: glm.fill_ids([9, 3], length_penalty=float("nan")), "`length_penalty`.*nan"),
        (lambda glm: glm.fill_ids([9, 3.5]), "whole numbers"),
        (lambda glm: glm.score("a [MASK]", ["b " * 200]), "context of 96"),
    ],
)
def test_what_is_refused(glm, call, message):
    with pytest.raises(InputError, match=message):
        call(glm)


def test_a_mask_that_was_not_learned_is_refused(config, state, tokenizer):
    limited = dataclasses.replace(config, learned_masks=("[MASK]", "[gMASK]"))
    glm = openglm.GLM.from_state(limited, state, tokenizer=tokenizer)
    with pytest.raises(UnlearnedMaskError, match=r"\[sMASK\].*\[MASK\] and \[gMASK\]"):
        glm.fill("A sentence. [sMASK]")
    glm.fill("A sentence. [MASK]", max_tokens=2)
    limited = dataclasses.replace(config, learned_masks=("[MASK]",))
    glm = openglm.GLM.from_state(limited, state, tokenizer=tokenizer)
    with pytest.raises(UnlearnedMaskError, match="gMASK"):
        glm.generate("Once upon a time")


def test_settings_say_when_they_draw():
    assert not SamplingSettings.of().draws
    assert SamplingSettings.of(temperature=0.8).draws
    assert SamplingSettings.of(top_p=0.9).draws
    assert not SamplingSettings.of(temperature=0.8, greedy=True).draws
    assert not SamplingSettings.of(temperature=0).draws
    assert SamplingSettings.of(SamplingSettings(max_tokens=3), seed=1) == SamplingSettings(max_tokens=3, seed=1)


def test_a_network_in_training_can_be_asked_in_between(config, state, tokenizer):
    network = GLM130B(config)
    network.load_state_dict({name.removeprefix("transformer."): tensor for name, tensor in state.items()})
    layout = blank_sample(range(20, 40), [4], [3], config.special_tokens)
    batch = Batch.stack([layout])

    def gradient() -> torch.Tensor:
        network.zero_grad()
        network(batch.tokens, batch.positions, batch.mask).square().mean().backward()
        assert network.word_embeddings.weight.grad is not None
        return network.word_embeddings.weight.grad.clone()

    openglm.GLM(network, tokenizer).fill(TEXTS[0], max_tokens=3)  # before and after the first step
    first = gradient()
    openglm.GLM(network, tokenizer).score(TEXTS[0], ["a", "b"])
    assert torch.equal(gradient(), first)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_load_from_a_folder(tmp_path, config, state, glm, tiny_tokenizer_path):
    save_checkpoint(tmp_path / "model", config, state.items(), tokenizer=tiny_tokenizer_path, dtype="float32")
    loaded = openglm.load(tmp_path / "model", device="cpu")
    assert loaded.engine.dtype == torch.float32
    assert loaded.fill(TEXTS[0], max_tokens=6) == glm.fill(TEXTS[0], max_tokens=6)
    half = openglm.load(tmp_path / "model", device="cpu", dtype="bfloat16", rotary_dtype="float16")
    assert half.engine.dtype == torch.bfloat16 and half.config.rotary_dtype == "float16"
    assert half.generate("Once upon a time", max_tokens=3).finish_reason in ("length", "end")


def test_a_model_without_a_tokenizer_still_fills_ids(tmp_path, config, state, tiny_tokenizer_path):
    save_checkpoint(tmp_path / "model", config, state.items(), dtype="float16")
    loaded = openglm.load(tmp_path / "model", device="cpu")
    assert loaded.tokenizer is None
    assert loaded.fill_ids([20, 3, 2], max_length=9)
    with pytest.raises(InputError, match="no tokenizer"):
        loaded.fill("a [MASK]")
    assert openglm.load(tmp_path / "model", device="cpu", tokenizer=tiny_tokenizer_path).fill("a [MASK]", max_tokens=2)


def test_a_foreign_tokenizer_is_refused(config, state, tokenizer):
    moved = dataclasses.replace(config, special_tokens={**config.special_tokens, "eop": 11})
    with pytest.raises(TokenizerError, match="`eop` is 8 there and 11 here"):
        openglm.GLM.from_state(moved, state, tokenizer=tokenizer)


def test_unknown_models_and_devices(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano/config.json").touch()
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(ModelNotFoundError, match="did you mean `nano`"):
        openglm.load("nanno")
    with pytest.raises(ModelNotFoundError, match="bundled: nano"):
        openglm.load("some/folder")
    save = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, inner_hidden_size=8, vocab_size=16, max_sequence_length=8
    )
    save_checkpoint(tmp_path / "m", save, random_state(save, 0).items(), dtype="float32")
    with pytest.raises(InputError, match="no device `abacus`"):
        openglm.load(tmp_path / "m", device="abacus")


def test_a_gpu_without_bfloat16_is_told_before_anything_is_read():
    with pytest.raises(InputError, match=r"RTX 2080 Ti \(compute capability 7.5\) does not compute in bfloat16; take float16"):
        check_type("RTX 2080 Ti", (7, 5), torch.bfloat16)
    check_type("RTX 2080 Ti", (7, 5), torch.float16)
    check_type("A100", (8, 0), torch.bfloat16)


def test_importing_openglm_imports_no_torch():
    code = (
        "import sys, openglm; assert 'torch' not in sys.modules; openglm.ModelConfig, openglm.errors, openglm.FillResult;"
        "assert 'torch' not in sys.modules; assert set(openglm.__all__) <= set(dir(openglm));"
        "[getattr(openglm, name) for name in openglm.__all__]; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        openglm.nothing  # noqa: B018
