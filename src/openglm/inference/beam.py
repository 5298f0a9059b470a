"""The original's beam search, deterministic (SPEC 5.4).

It differs from the usual one: beams that end are set aside with a penalised score, the search goes on until nothing
live can beat the worst of them, the penalty counts the whole sequence, prompt included, and one beam is not greedy
search. Rows of a batch are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openglm.inference.engine import Engine
from openglm.inference.sampling import FORBIDDEN
from openglm.infilling import Prompt


@dataclass(frozen=True)
class Hypothesis:
    """One answer: its tokens, end token included where it has one."""

    tokens: tuple[int, ...]
    score: float
    """Sum of log-probabilities after forbidding; penalised by length if the answer is finished."""
    log_probabilities: tuple[float, ...]
    """Of each token, by the network alone."""


@dataclass
class BeamResult:
    """What a row's search found, best first, and how it went."""

    answers: list[Hypothesis]
    steps: int
    ended_early: bool
    """The stop rule fired; otherwise the room was used up."""
    live_scores: list[list[float]]
    """Raw scores of the live beams after each step."""


@dataclass
class _Live:
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    log_probabilities: tuple[float, ...] = ()
    #: What may not follow the last n - 1 ids: only answers are recorded, though the first keys reach into the prompt.
    followers: dict[tuple[int, ...], frozenset[int]] = field(default_factory=dict)


@dataclass
class _Row:
    prompt: list[int]
    length: int
    room: int
    live: list[_Live] = field(default_factory=lambda: [_Live()])
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False
    live_scores: list[list[float]] = field(default_factory=list)


@torch.inference_mode()
def beam_search(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    ends: Sequence[int],
    rooms: Sequence[int],
    num_beams: int,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_tokens: int = 0,
    consider_end: bool = True,
    forbidden: Tensor | None = None,
    multiple: int = 1,
    count_padding: bool = False,
) -> list[BeamResult]:
    """The best ``num_beams`` answers of every prompt.

    ``rooms``: new tokens of each row at most. ``consider_end`` False returns the live beams and loses what ended.
    ``forbidden``: bool ``[v]``. The original's evaluation pads prompts to a ``multiple`` of 32 on the right and lets the
    padding count as length (``count_padding``); otherwise a batch equals its members.
    """
    decoding = engine.prefill(prompts, max(rooms), copies=num_beams, multiple=multiple)
    rows = []
    for prompt, room in zip(prompts, rooms, strict=True):
        ids = prompt.layout.tokens.tolist()
        if count_padding:
            ids += [0] * (decoding.width - len(ids))
        rows.append(_Row(ids, len(ids), room))
    search = _Search(list(ends), num_beams, length_penalty, no_repeat_ngram_size, min_tokens, forbidden)
    running, step = list(rows), 0
    with engine.one_thread():
        while True:
            parents = search.step(running, decoding.logits, step)
            step += 1
            # Row i of the decoding is beam i % width of its batch row; finished batch rows are dropped.
            width = decoding.logits.shape[0] // len(running)
            source, tokens = [], []
            for index, (row, parent) in enumerate(zip(running, parents, strict=True)):
                if not row.done and step < row.room:
                    source += [index * width + beam for beam in parent]
                    tokens += [beam.tokens[-1] for beam in row.live]
            still = [row for row in running if not row.done and step < row.room]
            if not still:
                break
            if source != list(range(decoding.logits.shape[0])):
                decoding.select(source, shared_prompt=width > 1 and len(still) == len(running))
            running = still
            decoding.append(torch.tensor(tokens, device=engine.device))
    return [search.result(row, consider_end) for row in rows]


class _Search:
    def __init__(
        self, ends: list[int], beams: int, penalty: float, ngram: int, min_tokens: int, forbidden: Tensor | None
    ) -> None:
        self.ends, self.beams, self.penalty, self.ngram = ends, beams, penalty, ngram
        self.min_tokens, self.forbidden = min_tokens, forbidden

    def penalised(self, score: float, length: int) -> float:
        return score / ((5 + length) / 6) ** self.penalty

    def step(self, rows: list[_Row], logits: Tensor, step: int) -> list[list[int]]:
        """Extend the live beams of every row by one token; the parent of each new live beam."""
        r, v = len(rows), logits.shape[1]
        plain = logits.log_softmax(-1)
        scores = self._allowed(rows, logits, step)
        scores = (plain if scores is logits else scores.log_softmax(-1)).view(r, -1, v)
        scores = scores + torch.tensor([[beam.score for beam in row.live] for row in rows], device=logits.device)[..., None]
        flat = scores.flatten(1)
        # Enough candidates that `beams` of them go on even if every end token of every beam is among them.
        best = flat.topk(min((max(1, len(self.ends)) + 1) * self.beams, flat.shape[1]))
        logs = plain.view(r, -1).gather(1, best.indices).tolist()
        values, indices = best.values.tolist(), best.indices.tolist()
        return [
            self._walk(row, list(zip(value, index, log, strict=True)), v)
            for row, value, index, log in zip(rows, values, indices, logs, strict=True)
        ]

    def _allowed(self, rows: list[_Row], logits: Tensor, step: int) -> Tensor:
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden, FORBIDDEN)
        if step < self.min_tokens and self.ends:
            logits = logits.index_fill(1, torch.tensor(self.ends, device=logits.device), FORBIDDEN)
        if self.ngram > 0:
            beams = [(row, beam) for row in rows for beam in row.live]
            pairs = [
                (number, token)
                for number, (row, beam) in enumerate(beams)
                if row.length + step > self.ngram
                for token in beam.followers.get(self._key(row, beam), ())
            ]
            if pairs:
                logits = logits.clone()
                logits[[p[0] for p in pairs], [p[1] for p in pairs]] = FORBIDDEN
        return logits

    def _key(self, row: _Row, beam: _Live) -> tuple[int, ...]:
        """The last n - 1 ids; all of them for n = 1, which therefore never forbids anything (as the original)."""
        ids = (*row.prompt, *beam.tokens)
        return ids[-(self.ngram - 1) :] if self.ngram > 1 else ids

    def _walk(self, row: _Row, candidates: list[tuple[float, int, float]], v: int) -> list[int]:
        live: list[_Live] = []
        parents: list[int] = []
        length = row.length + len(row.live[0].tokens) + 1
        for score, index, log in candidates:
            number, token = divmod(index, v)
            parent = row.live[number]
            tokens, logs = (*parent.tokens, token), (*parent.log_probabilities, log)
            if token in self.ends:
                self._finish(row, Hypothesis(tokens, self.penalised(score, length), logs))
            elif len(live) < self.beams:
                followers = parent.followers
                if self.ngram > 0:
                    key = self._key(row, parent)
                    followers = {**followers, key: followers.get(key, frozenset()) | {token}}
                live.append(_Live(tokens, score, logs, followers))
                parents.append(number)
            else:
                break
        row.live = live
        row.live_scores.append([beam.score for beam in live])
        worst = row.finished[-1].score if len(row.finished) == self.beams else float("-inf")
        row.done = len(row.finished) == self.beams and worst >= self.penalised(live[0].score, length)
        return parents

    def _finish(self, row: _Row, answer: Hypothesis) -> None:
        """Set aside, best first; a tie goes before its equals."""
        at = next((i for i, other in enumerate(row.finished) if answer.score >= other.score), len(row.finished))
        row.finished.insert(at, answer)
        del row.finished[self.beams :]

    def result(self, row: _Row, consider_end: bool) -> BeamResult:
        steps = len(row.live_scores)
        if consider_end and not row.done:
            for beam in row.live:
                score = self.penalised(beam.score, row.length + len(beam.tokens))
                self._finish(row, Hypothesis(beam.tokens, score, beam.log_probabilities))
        answers = row.finished if consider_end else [Hypothesis(b.tokens, b.score, b.log_probabilities) for b in row.live]
        return BeamResult(answers, steps, row.done, row.live_scores)
