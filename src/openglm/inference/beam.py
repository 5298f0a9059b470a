"""The original's beam search, deterministic (SPEC 5.4).

It differs from the usual one: beams that end are set aside with a penalised score, the search goes on until nothing
live can beat the worst of them, the penalty counts the whole sequence, prompt included, and one beam is not greedy
search. Rows of a batch are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openglm.inference.engine import Engine
from openglm.inference.sampling import FORBIDDEN, SamplingSettings
from openglm.inference.scheduler import Choice, Request, Token
from openglm.infilling import Prompt


@dataclass(frozen=True)
class Hypothesis:
    """One answer: its tokens, end token included where it has one."""

    tokens: tuple[int, ...]
    score: float
    """Sum of log-probabilities after forbidding; penalised by length if the answer is finished."""
    log_probabilities: tuple[float, ...]
    """Of each token, by the network alone."""

    def as_tokens(self, ends: Sequence[int]) -> list[Token]:
        """As they would come one by one."""
        return [Token(0, token, log, token in ends) for token, log in zip(self.tokens, self.log_probabilities, strict=True)]


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


class BeamWriter:
    """The search of one prompt, a step at a time."""

    def __init__(
        self,
        prompt: Sequence[int],
        room: int,
        *,
        ends: Sequence[int],
        num_beams: int,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        min_tokens: int = 0,
        consider_end: bool = True,
        forbidden: Tensor | None = None,
    ) -> None:
        self.width = num_beams
        self._prompt, self._room, self.ends, self._penalty = list(prompt), room, list(ends), length_penalty
        self._ngram, self._min_tokens, self._consider_end = no_repeat_ngram_size, min_tokens, consider_end
        self._forbidden = forbidden
        self._live = [_Live()]
        self._finished: list[Hypothesis] = []
        self._done = False
        self._live_scores: list[list[float]] = []

    def choose(self, logits: Tensor) -> Choice:
        """Extend the live beams by one token, from logits ``[beams, v]``."""
        v = logits.shape[1]
        plain = logits.log_softmax(-1)
        scores = self._allowed(logits)
        scores = plain if scores is logits else scores.log_softmax(-1)
        flat = (scores + torch.tensor([beam.score for beam in self._live], device=logits.device)[:, None]).flatten()
        # Enough candidates that `width` of them go on even if every end token of every beam is among them.
        best = flat.topk(min((max(1, len(self.ends)) + 1) * self.width, len(flat)))
        logs = plain.flatten()[best.indices].tolist()
        parents = self._walk(zip(best.values.tolist(), best.indices.tolist(), logs, strict=True), v)
        if self._done or len(self._live_scores) >= self._room:
            return Choice([], [])
        return Choice(parents, [beam.tokens[-1] for beam in self._live])

    def _allowed(self, logits: Tensor) -> Tensor:
        step = len(self._live_scores)
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, FORBIDDEN)
        if step < self._min_tokens and self.ends:
            logits = logits.index_fill(1, torch.tensor(self.ends, device=logits.device), FORBIDDEN)
        if self._ngram > 0 and len(self._prompt) + step > self._ngram:
            pairs = [
                (number, token) for number, beam in enumerate(self._live) for token in beam.followers.get(self._key(beam), ())
            ]
            if pairs:
                logits = logits.clone()
                logits[[p[0] for p in pairs], [p[1] for p in pairs]] = FORBIDDEN
        return logits

    def _key(self, beam: _Live) -> tuple[int, ...]:
        """The last n - 1 ids; all of them for n = 1, which therefore never forbids anything (as the original)."""
        ids = (*self._prompt, *beam.tokens)
        return ids[-(self._ngram - 1) :] if self._ngram > 1 else ids

    def _penalised(self, score: float, length: int) -> float:
        return score / ((5 + length) / 6) ** self._penalty

    def _walk(self, candidates: Iterable[tuple[float, int, float]], v: int) -> list[int]:
        """Live beams and finished answers from candidates, best first; the parent of each live beam."""
        live: list[_Live] = []
        parents: list[int] = []
        length = len(self._prompt) + len(self._live[0].tokens) + 1
        for score, index, log in candidates:
            number, token = divmod(index, v)
            parent = self._live[number]
            tokens, logs = (*parent.tokens, token), (*parent.log_probabilities, log)
            if token in self.ends:
                self._finish(Hypothesis(tokens, self._penalised(score, length), logs))
            elif len(live) < self.width:
                followers = parent.followers
                if self._ngram > 0:
                    key = self._key(parent)
                    followers = {**followers, key: followers.get(key, frozenset()) | {token}}
                live.append(_Live(tokens, score, logs, followers))
                parents.append(number)
            else:
                break
        self._live = live
        self._live_scores.append([beam.score for beam in live])
        worst = self._finished[-1].score if len(self._finished) == self.width else float("-inf")
        self._done = len(self._finished) == self.width and worst >= self._penalised(live[0].score, length)
        return parents

    def _finish(self, answer: Hypothesis) -> None:
        """Set aside, best first; a tie goes before its equals."""
        at = next((i for i, other in enumerate(self._finished) if answer.score >= other.score), len(self._finished))
        self._finished.insert(at, answer)
        del self._finished[self.width :]

    def result(self) -> BeamResult:
        """What was found, once the search is over."""
        if self._consider_end and not self._done:
            for beam in self._live:
                score = self._penalised(beam.score, len(self._prompt) + len(beam.tokens))
                self._finish(Hypothesis(beam.tokens, score, beam.log_probabilities))
        live = [Hypothesis(beam.tokens, beam.score, beam.log_probabilities) for beam in self._live]
        answers = self._finished if self._consider_end else live
        return BeamResult(answers, len(self._live_scores), self._done, self._live_scores)


def beam_search(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    rooms: Sequence[int],
    num_beams: int,
    multiple: int = 1,
    count_padding: bool = False,
    **options: Any,
) -> list[BeamResult]:
    """The best ``num_beams`` answers of every prompt.

    ``rooms``: new tokens of each row at most. Other options are those of ``BeamWriter``: ``consider_end`` False returns the
    live beams and loses what ended; ``forbidden`` is bool ``[v]``. The original's evaluation pads prompts to a ``multiple`` of
    32 on the right and lets the padding count as length (``count_padding``); otherwise a batch equals its members.
    """
    longest = -(-max(len(prompt.layout) for prompt in prompts) // multiple) * multiple
    columns = sum(len(prompt.layout) + num_beams * room for prompt, room in zip(prompts, rooms, strict=True))
    scheduler = engine.scheduler(columns, most_rows=num_beams * len(prompts))
    writers = []
    for prompt, room in zip(prompts, rooms, strict=True):
        ids = prompt.layout.tokens.tolist()
        if count_padding:
            ids += [0] * (longest - len(ids))
        writers.append(BeamWriter(ids, room, num_beams=num_beams, **options))
        scheduler.submit(Request(prompt, SamplingSettings(num_beams=num_beams), writers[-1].ends, room, writer=writers[-1]))
    for _ in scheduler.run():
        pass
    return [writer.result() for writer in writers]
