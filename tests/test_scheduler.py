"""Requests side by side: each is answered as it would be alone, whatever the others do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from test_generation import ENDS, PROMPTS, pair
from test_network import SPECIAL

import openglm
from openglm.checkpoints import convert_source, open_model
from openglm.config import QuantizationScheme
from openglm.errors import BusyError, InputError
from openglm.inference.beam import BeamWriter
from openglm.inference.engine import Engine
from openglm.inference.sampling import SamplingSettings, make_generator
from openglm.inference.scheduler import Request, Scheduler
from openglm.inference.speculation import LookupDrafter, ModelDrafter, check_draft
from openglm.infilling import blank_prompt, generation_prompt
from openglm.models.glm130b import GLM130B

GREEDY = SamplingSettings()
DRAWN = SamplingSettings.of(temperature=1.3, top_k=20, repetition_penalty=1.2, min_tokens=2, seed=5)


def request(kind: str, number: int, room: int = 9) -> Request:
    """One of some kinds of requests; the same number is the same request."""
    part_a, index = PROMPTS[number % 3]
    prompt = blank_prompt([*part_a[: index // 2], 30 + number, *part_a[index // 2 :]], index + 1, SPECIAL)
    if number % 4 == 3:
        prompt = generation_prompt(list(range(50, 57 + number)), SPECIAL, kind="[gMASK]", unidirectional=True)
    if kind == "greedy":
        return Request(prompt, GREEDY, ENDS, room)
    if kind == "drawn":
        return Request(prompt, DRAWN, ENDS, room, make_generator(number))
    writer = BeamWriter(prompt.layout.tokens.tolist(), room, ends=ENDS, num_beams=3, no_repeat_ngram_size=2)
    return Request(prompt, GREEDY, ENDS, room, writer=writer)


def answer(done: Request) -> object:
    return done.tokens if done.writer is None else done.writer.result().answers  # pyright: ignore[reportAttributeAccessIssue]


def alone(engine: Engine, kind: str, number: int, room: int = 9) -> object:
    made = request(kind, number, room)
    scheduler = Scheduler(engine, 200)
    scheduler.submit(made)
    assert all(token.row == 0 for token in scheduler.run())
    assert made.done
    return answer(made)


MIXED = [
    ("greedy", 0),
    ("beams", 1),
    ("drawn", 2),
    ("greedy", 3),
    ("drawn", 4),
    ("beams", 5),
    ("greedy", 6),
    ("drawn", 7),
    ("beams", 0),
]


@pytest.mark.parametrize("columns", [60, 90, 1000])
def test_requests_of_all_kinds_join_and_leave(columns):
    """In a cache for one or two of them, for some, and for all."""
    engine = pair(2)[0].engine
    scheduler = Scheduler(engine, columns)
    requests = [request(*one) for one in MIXED]
    for made in requests[:4]:
        scheduler.submit(made)
    most = steps = 0
    while not all(made.done for made in requests):
        scheduler.step()
        steps += 1
        most = max(most, scheduler.running)
        if steps % 3 == 0 and steps // 3 + 3 < len(requests):
            scheduler.submit(requests[steps // 3 + 3])
        assert steps < 200
    assert most > 1
    for made, one in zip(requests, MIXED, strict=True):
        found, expected = answer(made), alone(engine, *one)
        if made.writer is None:
            assert found == expected
        else:
            assert [a.tokens for a in found] == [a.tokens for a in expected]  # pyright: ignore
            for mine, own in zip(found, expected, strict=True):  # pyright: ignore
                assert mine.score == pytest.approx(own.score, abs=1e-9)
    scheduler.step()
    assert scheduler._decoding.pool.free == columns, "memory is held by nobody"


def test_what_is_cancelled_ends_and_gives_its_memory_back():
    engine = pair(2)[0].engine
    scheduler = Scheduler(engine, 80)
    first, second, third = (scheduler.submit(request(kind, n, 20)) for kind, n in (("beams", 1), ("greedy", 0), ("greedy", 3)))
    for _ in range(3):
        scheduler.step()
        assert (scheduler.running, scheduler.waiting) == (1, 2)
    scheduler.cancel(first)
    scheduler.cancel(third)
    for token in scheduler.run():
        assert token.row == second.number
    assert second.tokens == alone(engine, "greedy", 0, 20)
    assert not third.tokens
    assert scheduler._decoding.pool.free == 80


def test_requests_that_cannot_be_served_are_refused():
    scheduler = Scheduler(pair(2)[0].engine, 60, most_rows=4, most_waiting=2)
    with pytest.raises(InputError, match=r"needs 6\d columns .* and 3 sequences, there are 60 and 4"):
        scheduler.submit(request("beams", 1, 20))
    with pytest.raises(InputError, match="needs a generator"):
        scheduler.submit(Request(request("greedy", 0).prompt, DRAWN, ENDS, 4))
    scheduler.submit(request("greedy", 0))
    scheduler.submit(request("greedy", 1))
    with pytest.raises(BusyError, match="2 requests are waiting already; try again later"):
        scheduler.submit(request("greedy", 2))
    scheduler.step()
    scheduler.submit(request("greedy", 2))


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many tokens each call of the network read."""
    found: list[int] = []
    original = GLM130B.hidden_states

    def counting(self, tokens, *args, **kwargs):
        found.append(tokens.numel())
        return original(self, tokens, *args, **kwargs)

    monkeypatch.setattr(GLM130B, "hidden_states", counting)
    return found


def test_equal_prompts_are_read_and_kept_once(read):
    engine = pair(2)[0].engine
    scheduler = Scheduler(engine, 1000)
    requests = []
    for seed in range(4):
        made = request("drawn", 2)
        made.generator = make_generator(seed)
        requests.append(scheduler.submit(made))
    scheduler.submit(request("beams", 2))
    scheduler.step()
    length = len(requests[0].prompt.layout)
    assert read == [length]
    assert scheduler._decoding.pool.free == 1000 - length - 4 * 9 - 3 * 9
    late = scheduler.submit(request("greedy", 2))
    scheduler.step()
    assert sum(read) <= length + 8  # its prompt was there
    for _ in scheduler.run():
        pass
    assert late.tokens == alone(engine, "greedy", 2)
    for seed, made in enumerate(requests):
        own = request("drawn", 2)
        own.generator = make_generator(seed)
        scheduler.submit(own)
        for _ in scheduler.run():
            pass
        assert made.tokens == own.tokens


def test_a_common_beginning_is_read_once_from_left_to_right_only(read):
    engine = pair(2)[0].engine
    common, ends = list(range(30, 60)), ([70, 71, 72], [70, 74], [75, 76, 77, 78])
    for unidirectional in (True, False):
        prompts = [generation_prompt([*common, *end], SPECIAL, kind="[gMASK]", unidirectional=unidirectional) for end in ends]
        decoding = engine.decoding(400)
        read.clear()
        decoding.add(prompts, [6] * 3, [1, 1, 2])
        longest = max(len(prompt.layout) for prompt in prompts)
        assert read == ([len(prompts[0].layout), 2 * 4] if unidirectional else [3 * longest])
        assert (decoding.pool.free > 400 - 3 * longest) == unidirectional
        tokens = torch.tensor([80, 81, 82])
        found = [decoding.logits.clone(), decoding.append(tokens).clone()]
        decoding.select([2, 0, 2, 1])
        found.append(decoding.append(torch.tensor([83, 84, 85, 86])))
        for row, prompt in enumerate(prompts):
            alone = engine.prefill([prompt], 6)
            torch.testing.assert_close(found[0][row], alone.logits[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(found[1][row], alone.append(tokens[row : row + 1])[0], rtol=0, atol=1e-12)
            later = alone.append(torch.tensor([{0: 84, 1: 86, 2: 83}[row]]))[0]
            torch.testing.assert_close(found[2][{0: 1, 1: 3, 2: 0}[row]], later, rtol=0, atol=1e-12)
        decoding.select([])
        assert decoding.pool.free == 400


def drafters(seed: int) -> list:
    """Proposals from the text, from a model of its own mind, and from one that is always right."""
    other, same = pair(seed + 1)[0].engine, pair(seed)[0].engine
    return [LookupDrafter(count=3, longest=2, shortest=1), ModelDrafter(other, 2), ModelDrafter(same, 3)]


@pytest.mark.parametrize("which", range(3))
def test_speculation_changes_nothing(which):
    glm = pair(2)[0]
    drafter = drafters(2)[which]
    scheduler = Scheduler(glm.engine, 1000, drafter=drafter)
    requests = [scheduler.submit(request(*one, 20)) for one in MIXED]
    steps = 0
    while not all(made.done for made in requests):
        scheduler.step()
        steps += 1
    for made, one in zip(requests, MIXED, strict=True):
        if made.writer is None:
            assert made.tokens == alone(glm.engine, *one, 20)
    if which == 2:  # greedy requests agree with it
        assert scheduler.accepted > 0.3 * scheduler.proposed > 0
        assert steps <= 21
    scheduler.step()
    assert scheduler._decoding.pool.free == 1000
    assert not getattr(drafter, "_drafts", None)


def test_a_draft_of_another_vocabulary_is_refused():
    glm = pair(2)[0]
    with pytest.raises(InputError, match="the draft has a vocabulary of 16384, the model of 90"):
        check_draft(glm.engine, openglm.load("nano").engine)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> openglm.GLM:
    folder = tmp_path_factory.mktemp("nano") / "int8"
    source = open_model(Path(openglm.__file__).parent / "assets" / "nano")
    convert_source(source, folder, dtype=None, scheme=QuantizationScheme(8, 64, head_bits=8))
    return openglm.load(folder)


TEXTS = [
    "The old man walked to the [MASK] and looked at the sea. The old man walked to the",
    "One two three one two three one two three [gMASK]",
    "他[MASK]了。",
    "Once upon a time there was a king who had three daughters, and [MASK] loved him.",
    "天",
]


def test_seeded_requests_are_the_same_in_any_company(quantized):
    """Of a quantized model, and of one in bfloat16; greedy ones too where that is asked for."""
    for glm in (quantized, openglm.load("nano", dtype="bfloat16")):
        for options in ({"temperature": 1.0, "seed": 3}, {"deterministic": True}):
            together = glm.fill_batch(TEXTS, max_tokens=10, **options)
            for text, found in zip(TEXTS, together, strict=True):
                assert found == glm.fill(text, max_tokens=10, **options)  # texts, and log-probabilities to the last bit


def test_speculation_of_a_quantized_model_keeps_every_bit(quantized):
    engine = quantized.engine
    expected = quantized.fill_batch(TEXTS, max_tokens=24)
    for drafter in (LookupDrafter(), ModelDrafter(openglm.load("nano").engine, 3)):
        engine.drafter = drafter
        try:
            assert quantized.fill_batch(TEXTS, max_tokens=24) == expected
        finally:
            engine.drafter = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_a_narrow_cache_is_nearly_as_good(quantized, dtype):
    for glm in (quantized, openglm.load("nano")):
        if glm.engine.kernel is not None and dtype == torch.bfloat16:
            continue
        special = glm.config.special_tokens
        prompt = generation_prompt(glm.tokenizer.encode(TEXTS[3]), special, kind="[gMASK]")  # pyright: ignore
        found = []
        for narrow in (torch.float32, dtype):
            kept = glm.engine.cache_dtype
            glm.engine.set_cache_dtype(narrow)
            try:
                decoding = glm.engine.prefill([prompt, prompt], 6, copies=2)
                decoding.select([0, 0, 1])
                found.append([decoding.append(torch.tensor([50, 60, 70])) for _ in range(4)][-1])
            finally:
                glm.engine.cache_dtype = kept
        error = float((found[0] - found[1]).norm() / found[0].norm())
        assert 0 < error < 0.01, error


def test_room_is_kept(quantized):
    special = quantized.config.special_tokens
    decoding = quantized.engine.prefill([generation_prompt([50, 60], special, kind="[gMASK]")], 2)
    decoding.append(torch.tensor([[50, 60]]))
    with pytest.raises(InputError, match="room for 0 more tokens, not for 1"):
        decoding.append(torch.tensor([50]))


def test_a_pass_that_fails_loses_nothing(monkeypatch):
    """Of a prompt and of a step, with others running: what ran goes on, what waited waits, memory is given back."""
    engine = pair(2)[0].engine
    expected = [alone(engine, *one) for one in MIXED[:4]]
    for failing in range(4, 12):
        scheduler = Scheduler(engine, 400)
        requests = [scheduler.submit(request(*one)) for one in MIXED[:2]]
        scheduler.step()
        scheduler.step()
        requests += [scheduler.submit(request(*one)) for one in MIXED[2:4]]
        passes, original = [4], GLM130B.hidden_states

        def failing_pass(self, *args, failing=failing, passes=passes, original=original, **kwargs):
            passes[0] += 1
            if passes[0] in (failing, failing + 1):
                raise RuntimeError("out of memory")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(GLM130B, "hidden_states", failing_pass)
        for _ in range(60):
            with contextlib.suppress(RuntimeError):
                scheduler.step()
        monkeypatch.setattr(GLM130B, "hidden_states", original)
        assert all(made.done for made in requests)
        for made, wanted in zip(requests, expected, strict=True):
            if made.writer is None:
                assert answer(made) == wanted
        scheduler.step()
        assert scheduler._decoding.pool.free == 400


def test_columns_of_an_ended_request_are_free_while_others_share_its_prompt():
    engine = pair(2)[0].engine
    length = len(request("greedy", 0).prompt.layout)
    scheduler = Scheduler(engine, length + 20)
    first, second, third = (scheduler.submit(request("greedy", 0, 10)) for _ in range(3))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    scheduler.cancel(first)
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 0)
    for _ in scheduler.run():
        pass
    assert second.tokens == third.tokens == alone(engine, "greedy", 0, 10)


def test_drafts_end_with_their_answers_and_with_the_context(quantized):
    engine = quantized.engine
    engine.drafter = drafter = ModelDrafter(openglm.load("nano").engine, 4)
    try:
        long = "One two three four. " * 170
        ids = quantized.tokenizer.encode(long)  # pyright: ignore[reportOptionalMemberAccess]
        text = quantized.tokenizer.decode(ids[: quantized.config.max_sequence_length - 12])  # pyright: ignore
        options = {"max_tokens": 40, "min_tokens": 30}
        found = quantized.generate(text, **options)
        assert not drafter._drafts
        two = "The [MASK] man and the [MASK] woman."
        drawn = {"temperature": 1.0, "max_tokens": 12, "stop": ["e", "a"]}
        with_draft = [quantized.fill(two, seed=seed, **drawn) for seed in range(6)]
        assert not drafter._drafts
        stream = quantized.stream(TEXTS[3], max_tokens=20, min_tokens=20)
        next(stream)
        stream.close()
        assert not drafter._drafts
    finally:
        engine.drafter = None
    assert found == quantized.generate(text, **options)
    assert with_draft == [quantized.fill(two, seed=seed, **drawn) for seed in range(6)]


def test_beams_of_a_text_with_many_blanks_have_room(quantized):
    limit = quantized.config.max_sequence_length
    ids = quantized.tokenizer.encode("One two three four. " * 300)[: limit - 350]  # pyright: ignore
    text = quantized.tokenizer.decode(ids) + " [MASK]" * 4  # pyright: ignore
    assert len(quantized.fill(text, num_beams=3, max_tokens=80, min_tokens=75).spans) == 4
