"""What comes back: small frozen dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class _Plain:
    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Span(_Plain):
    """One blank that was filled; ``text`` is what stands at ``start`` to ``end`` (characters) of the result."""

    text: str
    token_ids: tuple[int, ...]
    """What the model wrote, without the end token. A stop string may have cut the text of the last ones."""
    log_probabilities: tuple[float, ...]
    """Of each token in natural logarithms, by the network alone: before penalties, temperature and filters."""
    finish_reason: str
    """"end" (the model ended it), "length" (max_tokens or the context length), "stop" (a stop string)."""
    kind: str
    """"[MASK]", "[sMASK]" or "[gMASK]"."""
    start: int
    end: int


@dataclass(frozen=True)
class FillResult(_Plain):
    """The text with its blanks filled; outside the spans it is the user's, character by character."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class GenerateResult(_Plain):
    """A text and its continuation; fields as in ``Span``."""

    text: str
    """The whole."""
    answer: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish_reason: str


@dataclass(frozen=True)
class ChoiceScore(_Plain):
    """One option: the sum of its tokens' log-probabilities, its number of tokens, and each of them."""

    text: str
    log_probability: float
    tokens: int
    token_log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class ScoreResult(_Plain):
    """Options in the order given; ``best`` is the index of the likeliest (by sum, as in the original's evaluation)."""

    best: int
    choices: tuple[ChoiceScore, ...]
