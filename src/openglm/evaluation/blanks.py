"""Blanks cut into texts by a fixed seed, and how many of them a model fills exactly.

They depend on the texts, the tokenizer and the seed; the SHA-256 of their ids says whether two runs had the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openglm.data.readers import Document
from openglm.errors import InputError
from openglm.inference.glm import GLM
from openglm.inference.sampling import SamplingSettings
from openglm.inference.writing import unwritable_ids
from openglm.infilling import blank_prompt, unidirectional_prompt
from openglm.tokenizers.base import Tokenizer

BLANKS = 250
"""Of each language."""
SEED = 2024
SHORTEST, LONGEST = 32, 96
"""Tokens of a passage with a blank."""
LONGEST_SPAN = 8
ANSWER = 16
"""Tokens of an answer at most, the end token included."""

_SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]+[\"'”’)]*\s+"  # behind a title no sentence ends
    r"|[。！？…]+[”’』」）\"]*\s*|\n\s*"
)


@dataclass(frozen=True)
class Blank:
    """A passage with one span missing."""

    language: str
    source: str
    part_a: list[int]
    """Token ids with one [MASK], eos at the end."""
    index: int
    """Of the mask."""
    answer: list[int]
    """The missing token ids."""


class Draws:
    """Whole numbers from a seed, the same for ever: numpy keeps the raw stream of PCG64, not what it derives from it."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def below(self, count: int) -> int:
        """From 0 to count - 1."""
        return int(self._bits.random_raw()) % count

    def span(self) -> int:
        """Poisson(3) restricted to 1..``LONGEST_SPAN``."""
        weights = np.cumsum([3**k / math.factorial(k) for k in range(1, LONGEST_SPAN + 1)])
        return int(np.searchsorted(weights, self.below(1 << 53) / (1 << 53) * weights[-1], side="right")) + 1


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the whitespace behind it; together they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    borders = [0, *ends, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders) if b > a]


def draw_passage(
    documents: Sequence[tuple[Document, list[str]]], tokenizer: Tokenizer, draws: Draws, shortest: int, longest: int
) -> tuple[Document, str, list[int]]:
    """Whole sentences of one document that together have so many tokens: the document, the text, its ids."""
    for _ in range(100_000):
        document, sentences = documents[draws.below(len(documents))]
        first = draws.below(len(sentences))
        wanted = shortest + draws.below(longest - shortest + 1)
        text, ids = "", []
        for end in range(first + 1, len(sentences) + 1):
            more = "".join(sentences[first:end]).strip()
            encoded = tokenizer.encode(more)
            if len(encoded) > wanted:
                break
            text, ids = more, encoded
        if len(ids) >= shortest:
            return document, text, ids
    raise InputError(f"the validation files hold no sentences of {shortest} to {longest} tokens")


def draw_blanks(
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    count: int = BLANKS,
    seed: int = SEED,
    *,
    exactly: bool = True,
) -> list[Blank]:
    """``count`` blanks of each language, always the same for the same documents, tokenizer and seed.

    ``exactly`` False takes fewer where the texts hold no more; otherwise that raises ``InputError``.

    A span begins at a word in English (its piece begins with a blank), at any piece in Chinese, and is no half character.
    """
    draws = Draws(seed)
    mask, eos = tokenizer.special_tokens["[MASK]"], tokenizer.special_tokens["eos"]
    blanks: list[Blank] = []
    for language, found in documents.items():
        split = [(document, split_sentences(document.text)) for document in found if document.text.strip()]
        passages: set[str] = set()
        for _ in range((1000 if exactly else 20) * count):
            document, text, ids = draw_passage(split, tokenizer, draws, SHORTEST, LONGEST)
            span, chance = draws.span(), draws.below(1 << 32)
            starts = [k for k in range(len(ids) - span + 1) if language != "en" or tokenizer.decode([ids[k]]).startswith(" ")]
            if text in passages or not starts:
                continue
            start = starts[chance % len(starts)]
            answer = ids[start : start + span]
            if "\ufffd" in tokenizer.decode(answer):
                continue
            passages.add(text)
            blanks.append(Blank(language, document.source, [*ids[:start], mask, *ids[start + span :], eos], start, answer))
            if len(passages) == count:
                break
        else:
            if not exactly:
                continue
            raise InputError(f"the {language} validation file has no {count} different passages for blanks")
    return blanks


def fingerprint(blanks: Sequence[Blank]) -> str:
    """SHA-256 of all ids."""
    text = json.dumps([[blank.language, blank.part_a, blank.index, blank.answer] for blank in blanks])
    return hashlib.sha256(text.encode()).hexdigest()


def fill_blanks(
    glm: GLM, blanks: Sequence[Blank], batch_size: int = 25, *, left_only: bool = False
) -> Iterator[tuple[list[int], bool]]:
    """For each blank the ids that the model writes greedily, and whether it came to an end by itself.

    ``left_only``: from the text before the blank alone, as many tokens as are missing; that is its end.
    """
    special = glm.config.special_tokens
    forbidden = unwritable_ids(glm.config, tokenizer_of(glm)).to(glm.engine.device)
    settings = SamplingSettings(max_tokens=ANSWER)
    for first in range(0, len(blanks), batch_size):
        part = blanks[first : first + batch_size]
        if left_only:
            prompts = [unidirectional_prompt(blank.part_a[: blank.index], special) for blank in part]
            rooms = [len(blank.answer) for blank in part]
        else:
            prompts = [blank_prompt(blank.part_a, blank.index, special) for blank in part]
            rooms = [ANSWER] * len(part)
        answers: list[list[int]] = [[] for _ in part]
        ended = [left_only] * len(part)
        ends = (special["eop"], special["eos"])
        for token in glm.engine.generate(prompts, settings, ends=ends, rooms=rooms, forbidden=forbidden):
            if token.ends:
                ended[token.row] = True
            else:
                answers[token.row].append(token.id)
        yield from zip(answers, ended, strict=True)


def tokenizer_of(glm: GLM) -> Tokenizer:
    """The model's tokenizer. Raises ``InputError`` if it has none."""
    if glm.tokenizer is None:
        raise InputError("this model has no tokenizer, so it cannot be measured on text")
    return glm.tokenizer


def is_exact(blank: Blank, answer: Sequence[int], ended: bool, tokenizer: Tokenizer) -> bool:
    """The model wrote the missing text, and then ended."""
    return ended and (list(answer) == blank.answer or tokenizer.decode(answer) == tokenizer.decode(blank.answer))


def count_exact(blanks: Sequence[Blank], exact: Sequence[bool]) -> dict[str, dict[str, dict[str, int]]]:
    """{"by_language": {name: {"blanks", "exact"}}, "by_span_length": the same}."""

    def count(chosen: Sequence[bool]) -> dict[str, int]:
        return {"blanks": sum(chosen), "exact": sum(e for e, c in zip(exact, chosen, strict=True) if c)}

    names = dict.fromkeys(blank.language for blank in blanks)
    languages = {name: count([blank.language == name for blank in blanks]) for name in names}
    lengths = {str(n): count([len(blank.answer) == n for blank in blanks]) for n in range(1, LONGEST_SPAN + 1)}
    return {"by_language": {**languages, "all": count([True] * len(blanks))}, "by_span_length": lengths}
