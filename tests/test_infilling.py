"""Layouts of blanks: recorded ones of the original, small ones by hand, and the training samples' invariants."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from openglm import infilling
from openglm.config import OWN_SPECIAL_TOKENS, RELEASED_SPECIAL_TOKENS, ModelConfig
from openglm.errors import InputError
from openglm.models.glm130b import GLM130B

SPECIAL = RELEASED_SPECIAL_TOKENS
SMALL = {"pad": 0, "eos": 2, "[MASK]": 3, "[gMASK]": 4, "[sMASK]": 5, "sop": 7, "eop": 8}


class Words:
    """A tokenizer of plain ids: what the recordings use as text."""

    special_tokens = SPECIAL

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def hidden(layout: infilling.Layout) -> list[str]:
    return ["".join("0" if seen else "1" for seen in row) for row in layout.visible()]


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "golden/model/layouts.json").read_text())


def cases(recorded, builder):
    found = [case for case in recorded if case["builder"] == builder]
    assert found
    return found


def test_prompts_equal_the_recorded_ones(recorded):
    for case in cases(recorded, "fill_blanks"):
        part_a = infilling.encode_text(case["text"], Words())
        kind = infilling.mask_kind(part_a, SPECIAL)
        assert kind is not None
        prompt = infilling.blank_prompt(part_a, part_a.index(SPECIAL[kind]), SPECIAL)
        assert prompt.layout.tokens.tolist() == case["input_ids"]
        assert prompt.mask_index == case["mask_position"]
        c = len(case["input_ids"])
        positions = [*prompt.layout.positions, *prompt.answer_positions(case["out_seq_length"] - c)]
        assert positions == case["position_ids"]
        assert hidden(prompt.layout) == [row[:c] for row in case["hidden"][:c]]
        # An answer token sees part A, sop and the answer so far.
        for k, row in enumerate(case["hidden"][c:]):
            assert row == "0" * (c + k + 1) + "1" * (case["out_seq_length"] - c - k - 1)


def test_generation_prompts_equal_the_recorded_ones(recorded):
    for case in cases(recorded, "generation sample"):
        prompt = infilling.generation_prompt(
            case["text_ids"],
            SPECIAL,
            kind="[gMASK]" if case["use_task_mask"] else "[MASK]",
            unidirectional=case["unidirectional"],
            max_length=case.get("max_seq_length", 2048),
            max_answer=case["max_gen_length"],
        )
        assert prompt.layout.tokens.tolist() == case["input_ids"]
        assert prompt.layout.positions.tolist() == case["position_ids"]
        assert prompt.answer_positions(len(case["answer_position_ids"])).tolist() == case["answer_position_ids"]
        assert hidden(prompt.layout) == case["hidden"]


def test_choices_equal_the_recorded_ones(recorded):
    for case in cases(recorded, "multiple choice"):
        kind = "[gMASK]" if case["use_task_mask"] else "[MASK]"
        layout, rows = infilling.choice_layout(case["text_ids"], case["choices"], SPECIAL, kind)
        assert layout.tokens.tolist() == case["input_ids"]
        assert layout.positions.tolist() == case["position_ids"]
        expected = case["choice_target_ids"]
        if isinstance(expected[0], int):  # options of one token share their row
            expected = [expected] * len(case["choices"])
        assert [row.tolist() for row in rows] == expected
        assert hidden(layout) == case["hidden"]


def test_windows_equal_the_recorded_ones(recorded):
    for case in cases(recorded, "language model windows"):
        windows = list(
            infilling.language_model_windows(
                case["text_ids"],
                SPECIAL,
                max_length=case["max_seq_length"],
                generation_length=case["generation_length"],
                kind="[gMASK]" if case["use_task_mask"] else "[MASK]",
                unidirectional=case["unidirectional"],
            )
        )
        assert len(windows) == len(case["windows"])
        for layout, window in zip(windows, case["windows"], strict=True):
            assert layout.targets is not None
            assert layout.tokens.tolist() == window["input_ids"]
            assert layout.positions.tolist() == window["position_ids"]
            assert hidden(layout) == window["hidden"]
            loss = layout.targets != infilling.NO_TARGET
            assert loss.astype(int).tolist() == window["loss_mask"]
            assert layout.targets[loss].tolist() == np.asarray(window["targets"])[loss].tolist()


def test_two_blanks_by_hand():
    # text 20 21 [MASK] 22 [MASK] 23 eos; the first blank is filled while the second stays visible.
    prompt = infilling.blank_prompt([20, 21, 3, 22, 3, 23, 2], 2, SMALL)
    assert prompt.layout.tokens.tolist() == [20, 21, 3, 22, 3, 23, 2, 7]
    assert prompt.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 2]
    assert prompt.answer_positions(3).tolist() == [2, 2, 2]
    assert hidden(prompt.layout) == ["00000001"] * 7 + ["00000000"]


def test_gmask_positions_run_on_by_hand():
    prompt = infilling.blank_prompt([20, 21, 4], 2, SMALL)
    assert prompt.layout.positions.tolist() == [0, 1, 2, 3]
    assert prompt.answer_positions(3).tolist() == [4, 5, 6]


def test_unidirectional_by_hand():
    prompt = infilling.unidirectional_prompt([20, 21], SMALL)
    assert prompt.layout.tokens.tolist() == [4, 7, 20, 21]
    assert hidden(prompt.layout) == ["0111", "0011", "0001", "0000"]
    assert prompt.answer_positions(2).tolist() == [4, 5]


def test_training_blanks_by_hand():
    # 20 (21 22) 23 24 (25) 26: two spans, the second one first in part B.
    layout = infilling.blank_sample([20, 21, 22, 23, 24, 25, 26], [1, 5], [2, 1], SMALL, order=[1, 0])
    assert layout.targets is not None
    assert layout.tokens.tolist() == [20, 3, 23, 24, 3, 26, 7, 25, 7, 21, 22]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 4, 1, 1, 1]
    assert layout.targets.tolist() == [-1] * 6 + [25, 8, 21, 22, 8]
    assert layout.context == 6
    assert layout.visible()[:6].tolist() == [[True] * 6 + [False] * 5] * 6
    assert layout.visible()[8].tolist() == [True] * 9 + [False] * 2


def test_training_generation_by_hand():
    layout = infilling.generation_sample([20, 21, 22, 23, 24], 3, SMALL)
    assert layout.targets is not None
    assert layout.tokens.tolist() == [20, 21, 4, 7, 22, 23]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.targets.tolist() == [-1, -1, -1, 22, 23, 24]
    assert layout.context == 3


def test_an_empty_prefix_is_a_plain_language_model():
    layout = infilling.generation_sample([20, 21, 22], 3, SMALL)
    assert layout.visible().tolist() == np.tril(np.ones((4, 4), dtype=bool)).tolist()


def test_instructions_by_hand():
    layout = infilling.answer_sample([20, 21], [30, 31], 16, SMALL)
    assert layout.targets is not None
    assert layout.tokens.tolist() == [20, 21, 3, 7, 30, 31]
    assert layout.positions.tolist() == [0, 1, 2, 2, 2, 2]
    assert layout.targets.tolist() == [-1, -1, -1, 30, 31, 8]


def test_a_long_instruction_fits_and_a_cut_answer_does_not_end():
    layout = infilling.answer_sample(list(range(100, 140)), list(range(200, 240)), 16, SMALL)
    assert layout.targets is not None
    assert len(layout) == 16
    assert layout.tokens.tolist() == [100, 101, 102, 103, 3, 7, *range(200, 210)]
    assert layout.targets.tolist()[-2:] == [209, -1]


@pytest.mark.parametrize("available", [2, 3, 7, 40, 200, 460, 467, 480, 512, 5000])
def test_blank_samples_fit_the_window_and_lose_nothing(available):
    rng = np.random.default_rng(available)
    for _ in range(200):
        length, spans = infilling.draw_spans(available, 512, rng)
        starts = infilling.place_spans(length, spans, rng)
        assert length + 2 * len(spans) <= 512 and length <= available
        ends = starts + spans
        assert starts[0] >= 0 and ends[-1] <= length
        assert (starts[1:] > ends[:-1]).all()  # a visible token between neighbours
        tokens = rng.integers(100, 1000, length)
        order = rng.permutation(len(spans))
        layout = infilling.blank_sample(tokens, starts, spans, SMALL, order=order)
        assert layout.targets is not None
        assert len(layout) == length + 2 * len(spans)
        assert (layout.targets != -1).sum() == spans.sum() + len(spans)
        # Put the answers back and the text is whole again.
        part_a, part_b = layout.tokens[: layout.context], layout.targets[layout.context :]
        answers = np.split(part_b, np.flatnonzero(part_b == SMALL["eop"]) + 1)[:-1]
        opens = layout.context + np.flatnonzero(layout.tokens[layout.context :] == SMALL["sop"])
        back = {int(layout.positions[i]): answer[:-1] for i, answer in zip(opens, answers, strict=True)}
        restored = np.concatenate([back[i] if t == 3 else [t] for i, t in enumerate(part_a)])
        assert restored.tolist() == tokens.tolist()


def test_long_texts_fill_the_window_to_15_percent():
    rng = np.random.default_rng(0)
    drawn = [infilling.draw_spans(10_000, 512, rng) for _ in range(500)]
    lengths = np.array([n for n, _ in drawn])
    masked = np.array([s.sum() for _, s in drawn])
    assert (lengths + 2 * np.array([len(s) for _, s in drawn]) == 512).all()
    assert (masked >= (0.15 * lengths).astype(int)).all()
    assert abs(lengths.mean() - 467) < 2  # the mean that SPEC 3.4.1a derives


def test_sentence_spans_do_not_touch():
    rng = np.random.default_rng(1)
    for _ in range(100):
        starts, spans = infilling.sentence_spans([5, 9, 20, 22, 40], 40, rng, ratio=0.5)
        assert set(starts.tolist()) <= {0, 5, 9, 20, 22}
        assert (starts[1:] > (starts + spans)[:-1]).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batches_agree_with_the_readable_mask(padding):
    rng = np.random.default_rng(3)
    layouts = [
        infilling.blank_prompt([20, 21, 3, 22, 2], 2, SMALL).layout,
        infilling.unidirectional_prompt([20, 21, 22, 23, 24, 25, 26], SMALL).layout,
        infilling.choice_layout([20, 21], [[30, 31], [32, 33, 34]], SMALL, "[MASK]")[0],
        infilling.generation_sample(rng.integers(20, 90, 12), 6, SMALL),
    ]
    batch = infilling.Batch.stack(layouts, padding=padding, multiple=8)
    assert batch.tokens.shape == (4, 16)
    for row, layout in enumerate(layouts):
        keep = batch.valid[row]
        assert batch.tokens[row][keep].tolist() == layout.tokens.tolist()
        assert batch.positions[row][keep].tolist() == layout.positions.tolist()
        assert batch.mask[row][keep][:, keep].tolist() == layout.visible().tolist()
        assert not batch.mask[row][~keep].any() and not batch.mask[row][:, ~keep].any()
        assert batch.positions[row][~keep].eq(0).all()


def test_bad_layouts_are_refused():
    with pytest.raises(InputError, match="no mask token at index 1"):
        infilling.blank_prompt([20, 21], 1, SMALL)
    with pytest.raises(InputError, match="at least one token"):
        infilling.choice_layout([20], [[30], []], SMALL, "[MASK]")


def test_the_blank_before_a_mask_belongs_to_the_answer():
    assert infilling.split_text("The [MASK] sat [gMASK]") == ["The ", "[MASK]", " sat ", "[gMASK]", ""]
    assert infilling.place_answer("The ", " cat") == "cat"
    assert infilling.place_answer("The", " cat") == " cat"
    assert infilling.place_answer("", " Cat") == "Cat"


def test_aggregated_samples_see_only_themselves() -> None:
    rng = np.random.default_rng(0)
    special = OWN_SPECIAL_TOKENS
    samples = []
    for number in range(7):
        text = rng.integers(11, 90, int(rng.integers(6, 20)))
        if number % 2:
            samples.append(infilling.generation_sample(text, int(rng.integers(1, len(text))), special))
        else:
            length, spans = infilling.draw_spans(len(text), 40, rng)
            samples.append(infilling.blank_sample(text[:length], infilling.place_spans(length, spans, rng), spans, special))
    rows = [samples[:3], samples[3:6], [], samples[6:]]
    batch = infilling.Batch.aggregate(rows, 96)
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, inner_hidden_size=48, vocab_size=96)
    network = GLM130B(config).initialize(0).eval()
    with torch.inference_mode():
        logits = network(batch.tokens, batch.positions, batch.mask)
        for row, layouts in enumerate(rows):
            start = 0
            for layout in layouts:
                end = start + len(layout)
                # The twin: the sample alone.
                assert torch.equal(batch.mask[row, start:end, start:end], torch.from_numpy(layout.visible()))
                assert not batch.mask[row, start:end, :start].any() and not batch.mask[row, start:end, end:].any()
                alone = infilling.Batch.stack([layout])
                expected = network(alone.tokens, alone.positions, alone.mask)[0]
                torch.testing.assert_close(logits[row, start:end], expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(batch.targets[row, start:end], alone.targets[0])
                start = end
            assert not batch.valid[row, start:].any() and not batch.mask[row, start:].any()
    with pytest.raises(InputError, match="do not fit a row of 20"):
        infilling.Batch.aggregate([samples], 20)
