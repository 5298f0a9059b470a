"""Generation as the original does it: its recordings, and the float64 twin where no recordings are at hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import recorded
import torch
from test_network import SMALL, SPECIAL, double_network, random_state
from twin import Filler, Twin

from openglm import GLM
from openglm.errors import InputError
from openglm.inference.beam import beam_search
from openglm.inference.sampling import SamplingSettings, draw, filter_logits, make_generator, penalize
from openglm.infilling import blank_prompt, generation_prompt

ENDS = [SPECIAL["eop"], SPECIAL["eos"]]


@pytest.fixture(scope="module")
def golden(shared):
    return recorded.Recorded(shared)


@pytest.mark.parametrize("table", recorded.TABLES)
def test_recorded_greedy_answers(golden, table):
    row = recorded.greedy_difference(golden, table)
    assert row.holds and row.cases == 23, row


@pytest.mark.parametrize("table", recorded.TABLES)
def test_recorded_beam_searches(golden, table):
    rows = recorded.beam_differences(golden, table)
    assert rows[0].cases == 101
    for row in rows:
        assert row.holds, row


@pytest.mark.parametrize("table", recorded.TABLES)
def test_recorded_batches(golden, table):
    row = recorded.batch_difference(golden, table)
    assert row.holds and row.cases == 20, row


def test_recorded_filters(golden):
    for row in recorded.filter_differences(golden):
        assert row.holds and row.cases == 61, row


# ---------------------------------------------------------------------------------------------------------------------
# Against the twin, on models with random weights


def pair(seed: int) -> tuple[GLM, Filler]:
    """A small model that likes to end now and then, and its twin."""
    state = random_state(SMALL, seed)
    state["transformer.word_embeddings.weight"] *= 1.5
    for end in ENDS:
        # End tokens along the bias of the final norm: their logits are raised alike everywhere.
        bias = state["transformer.final_layernorm.bias"]
        state["transformer.word_embeddings.weight"][end] += 0.8 * bias / bias.norm()
    return GLM(double_network(SMALL, state)), Filler(Twin(3, 4, state), SPECIAL)


PROMPTS = [
    ([20, 21, 3, 22, 23, 2], 2),
    ([31, 32, 33, 5, 34, 2], 3),
    ([40, 41, 42, 43, 4], 4),
]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_the_twin(seed):
    glm, filler = pair(seed)
    for part_a, index in PROMPTS:
        expected = filler.greedy(part_a, index, room=10)
        found = glm.fill_ids(part_a, max_length=len(part_a) + 1 + 10)
        assert found == [[[token for token in expected if token not in ENDS]]]


GRID = list(itertools.product((1, 2, 3), (0.0, 1.0, 2.0), (0, 2), (0, 3), (True, False)))


@pytest.mark.parametrize("seed", range(2))
def test_beam_search_equals_the_twin(seed):
    glm, filler = pair(10 + seed)
    ended = kept = 0
    for number, (beams, penalty, ngram, shortest, consider_end) in enumerate(GRID):
        if number % 5 != seed and number % 5 != seed + 2:
            continue
        part_a, index = PROMPTS[number % 3]
        expected = filler.beam(part_a, index, 7, beams, penalty, ngram, shortest, consider_end)
        result = beam_search(
            glm.engine,
            [blank_prompt(part_a, index, SPECIAL)],
            ends=ENDS,
            rooms=[7],
            num_beams=beams,
            length_penalty=penalty,
            no_repeat_ngram_size=ngram,
            min_tokens=shortest,
            consider_end=consider_end,
        )[0]
        assert [list(answer.tokens) for answer in result.answers] == [answer for _, answer in expected]
        assert [answer.score for answer in result.answers] == pytest.approx([score for score, _ in expected], abs=1e-5)
        ended += any(answer.tokens[-1] in ENDS for answer in result.answers)
        kept += any(answer.tokens[-1] not in ENDS for answer in result.answers)
    assert ended and kept  # both ways out of the search were walked


def test_one_beam_is_not_greedy():
    """It looks on after the first end token, and takes the best by penalised score."""
    for seed in range(20):
        glm, _ = pair(seed)
        for part_a, _ in PROMPTS:
            greedy = glm.fill_ids(part_a, max_length=20)
            beam = glm.fill_ids(part_a, search="beam", num_beams=1, length_penalty=2.0, max_length=20)
            if greedy != beam:
                return
    pytest.fail("one beam was greedy everywhere")


def test_rows_of_a_beam_search_are_independent():
    glm, _ = pair(5)
    prompts = [blank_prompt(part_a, index, SPECIAL) for part_a, index in PROMPTS]
    options = {"ends": ENDS, "num_beams": 3, "length_penalty": 0.7, "no_repeat_ngram_size": 2}
    for consider_end in (True, False):
        together = beam_search(glm.engine, prompts, rooms=[3, 9, 7], consider_end=consider_end, **options)
        for prompt, room, result in zip(prompts, [3, 9, 7], together, strict=True):
            alone = beam_search(glm.engine, [prompt], rooms=[room], consider_end=consider_end, **options)[0]
            assert [a.tokens for a in result.answers] == [a.tokens for a in alone.answers]
            assert [a.score for a in result.answers] == pytest.approx([a.score for a in alone.answers], abs=1e-5)
            assert (result.steps, result.ended_early) == (alone.steps, alone.ended_early)


def test_log_probabilities_of_a_beam_are_the_networks_own():
    glm, filler = pair(6)
    part_a, index = PROMPTS[0]
    forbidden = torch.zeros(SMALL.vocab_size, dtype=torch.bool)
    forbidden[50:] = True
    results = beam_search(
        glm.engine, [blank_prompt(part_a, index, SPECIAL)], ends=ENDS, rooms=[5], num_beams=2, min_tokens=2, forbidden=forbidden
    )
    for answer in results[0].answers:
        expected = [
            float(filler.scores(part_a, index, list(answer.tokens[:k])).log_softmax(-1)[token])
            for k, token in enumerate(answer.tokens)
        ]
        assert answer.log_probabilities == pytest.approx(expected, abs=1e-5)
        assert max(answer.tokens) < 50


def test_several_blanks_are_filled_one_kind_at_a_time():
    glm, filler = pair(7)
    part_a = [20, 3, 21, 5, 22, 3, 23, 2]
    room = 12 - len(part_a) - 1
    first = [t for t in filler.greedy(part_a, 1, room) if t not in ENDS]
    filled = [20, *first, 21, 5, 22, 3, 23, 2]
    second = [t for t in filler.greedy(filled, filled.index(3), 12 - len(filled) - 1) if t not in ENDS]
    assert glm.fill_ids(part_a, max_length=12) == [[first, second]]


def test_only_the_best_beam_goes_on_to_the_next_blank():
    glm, _ = pair(8)
    part_a = [20, 3, 21, 22, 3, 23, 2]
    beams = glm.fill_ids(part_a, search="beam", num_beams=3, max_length=14)
    one = glm.fill_ids([20, 3, 21, 22, 40, 23, 2], search="beam", num_beams=3, max_length=14)
    assert len(beams) == len(one) == 3 and all(len(beam) == 2 for beam in beams)
    filled = [20, *beams[0][0], 21, 22, 3, 23, 2]
    assert glm.fill_ids(filled, search="beam", num_beams=3, max_length=14) == [[beam[1]] for beam in beams]


def test_an_answer_that_writes_its_own_mask_comes_to_an_end():
    state = random_state(SMALL, 9)
    bias = state["transformer.final_layernorm.bias"]
    state["transformer.word_embeddings.weight"][SPECIAL["[MASK]"]] = 50 * bias / bias.norm()
    glm = GLM(double_network(SMALL, state))
    filled = glm.fill_ids([20, 3, 21, 2], max_length=6)
    assert all(answer == [3] for answer in filled[0])


def test_what_fill_ids_refuses():
    glm, _ = pair(0)
    for ids, options, message in (
        ([20, 21], {}, "no blank"),
        ([20, 3, 900], {}, "900"),
        ([20, 3, 21, 2], {"max_length": 5}, "`max_length` is 5"),
        ([20, 3], {"search": "best"}, "best"),
        ([20, 3], {"num_beams": 0}, "num_beams"),
    ):
        with pytest.raises(InputError, match=message):
            glm.fill_ids(ids, **options)
    assert len(glm.fill_ids([20, 3, 21, 2], max_length=6)[0][0]) <= 1  # one token of room is enough


# ---------------------------------------------------------------------------------------------------------------------
# Filters and draws


def plain_filter(logits: np.ndarray, temperature: float, forbidden: set[int], top_k: int, top_p: float) -> dict[int, float]:
    """SPEC 5.3 in words: id to probability of what stays."""
    scores = {i: x / temperature for i, x in enumerate(logits.tolist()) if i not in forbidden}
    if 0 < top_k < len(scores):
        limit = sorted(scores.values(), reverse=True)[top_k - 1]
        scores = {i: x for i, x in scores.items() if x >= limit}
    if top_p:
        total = sum(np.exp(x) for x in scores.values())
        kept, before = {}, 0.0
        for i, x in sorted(scores.items(), key=lambda item: -item[1]):
            if before > top_p:
                break
            kept[i] = x
            before += np.exp(x) / total
        scores = kept
    total = sum(np.exp(x) for x in scores.values())
    return {i: np.exp(x) / total for i, x in scores.items()}


def test_filters_do_what_the_spec_says():
    rng = np.random.default_rng(0)
    for size in (8, 600):  # below and above the head that top-p sorts first
        logits = rng.normal(size=size) * 2
        for temperature, top_k, top_p in itertools.product((0.5, 1.0, 3.0), (0, 1, 5), (0.0, 0.3, 0.9, 0.999)):
            banned = {1, int(logits.argmax())}
            forbidden = torch.zeros(size, dtype=torch.bool)
            forbidden[list(banned)] = True
            found = filter_logits(
                torch.from_numpy(logits)[None], temperature=temperature, forbidden=forbidden, top_k=top_k, top_p=top_p
            )
            expected = np.zeros(size)
            for token, probability in plain_filter(logits, temperature, banned, top_k, top_p).items():
                expected[token] = probability
            np.testing.assert_allclose(found.softmax(-1)[0].numpy(), expected, atol=1e-12)


def test_ties_of_the_kth_stay_and_the_rows_of_a_batch_are_filtered_apart():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0], [0.0, 5.0, 4.0, -1.0, -2.0]])
    assert (filter_logits(logits, top_k=2).softmax(-1) > 0).sum(-1).tolist() == [4, 2]
    assert (filter_logits(logits, top_k=99).softmax(-1) > 0).sum(-1).tolist() == [5, 5]
    for row in range(2):
        together = filter_logits(logits, temperature=0.7, top_k=3, top_p=0.8)[row]
        assert torch.equal(together, filter_logits(logits[row : row + 1], temperature=0.7, top_k=3, top_p=0.8)[0])


def test_penalty_makes_written_tokens_less_likely_on_either_side_of_zero():
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    assert penalize(logits, torch.tensor([[True, True, False]]), 2.0).tolist() == [[1.0, -4.0, 2.0]]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    logits = probabilities.log().nan_to_num(neginf=-65504.0).expand(4000, -1)
    generator = make_generator(3)
    counts = torch.bincount(draw(logits, [generator] * 4000), minlength=5) / 4000
    assert counts[1] == counts[4] == 0
    torch.testing.assert_close(counts, probabilities, atol=0.03, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_equals_its_members(padding):
    glm, _ = pair(4)
    prompts = [blank_prompt(part_a, index, SPECIAL) for part_a, index in PROMPTS]
    prompts.append(generation_prompt(list(range(50, 59)), SPECIAL, kind="[gMASK]", unidirectional=True))
    together = glm.engine.prefill(prompts, 6, padding=padding)
    alone = [glm.engine.prefill([prompt], 6) for prompt in prompts]
    for _ in range(6):
        for row, decoding in enumerate(alone):
            torch.testing.assert_close(together.logits[row], decoding.logits[0], rtol=0, atol=1e-12)
        tokens = together.logits.argmax(-1)
        together.append(tokens)
        for row, decoding in enumerate(alone):
            decoding.append(tokens[row : row + 1])

    settings = SamplingSettings(max_tokens=8)
    rooms = [8, 3, 8, 5]
    written: list[list[int]] = [[] for _ in prompts]
    for token in glm.engine.generate(prompts, settings, ends=ENDS, rooms=rooms, padding=padding):
        written[token.row].append(token.id)
    for prompt, room, ids in zip(prompts, rooms, written, strict=True):
        assert ids == [token.id for token in glm.engine.generate([prompt], settings, ends=ENDS, rooms=[room])]
