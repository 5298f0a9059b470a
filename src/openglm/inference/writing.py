"""A text while its blanks are filled: the draft, and the answer that is being written into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openglm.config import REQUIRED_SPECIAL_TOKENS, ModelConfig
from openglm.errors import TokenizerError
from openglm.inference.results import Span
from openglm.infilling import first_blank, place_answer, split_text
from openglm.tokenizers import icetk
from openglm.tokenizers.base import Tokenizer


def unwritable_ids(config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """bool ``[v]``: ids that make no sense in an answer. Masks, ``sop``, padding and the like, and rows without a text.

    The end tokens are not among them. Raises ``TokenizerError`` if the tokenizer is not the model's.
    """
    for name in REQUIRED_SPECIAL_TOKENS:
        if tokenizer.special_tokens.get(name) != config.special_tokens[name]:
            raise TokenizerError(
                f"the tokenizer does not fit the model: `{name}` is {tokenizer.special_tokens.get(name)} there "
                f"and {config.special_tokens[name]} here"
            )
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer does not fit the model: it has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    mask = torch.zeros(config.vocab_size, dtype=torch.bool)
    mask[tokenizer.vocab_size :] = True
    if isinstance(tokenizer, icetk.IcetkTokenizer):
        # Ids of images, and the unknown, start and padding pieces, which no text has (SPEC 7.1).
        mask[: icetk.TEXT_OFFSET + 4] = True
    mask[list({*tokenizer.special_tokens.values(), *config.special_tokens.values()})] = True
    mask[[config.special_tokens["eop"], config.special_tokens["eos"]]] = False
    return mask


class Answer:
    """Tokens of one blank, turned into text as they come; ends at an end token or before a stop string.

    What may be the beginning of a stop string, or half a character, is held back until it is certain.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: str) -> None:
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._before = before
        self._held = ""
        self._begun = False
        self.gap = ""
        """The leading blank of the answer that stands in the user's text already; only its ids bring it along."""
        self.text = ""
        """What is certain so far, as it stands in the user's text."""
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish_reason = "length"
        self.finished = False

    def push(self, token: int, log_probability: float, ends: bool) -> str:
        """One more token; the text that has become certain with it, often ''."""
        if ends:
            self.finish_reason, self.finished = "end", True
            return ""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """The rest, once no more tokens come."""
        if self.finish_reason == "stop":
            return ""
        text = self._take(self._decoder.flush()) + self._held
        self.text += self._held
        self._held = ""
        return text

    def _take(self, piece: str) -> str:
        if piece and not self._begun:
            placed, self._begun = place_answer(self._before, piece), True
            self.gap, piece = piece.removesuffix(placed), placed
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            text, self._held = text[: min(found)], ""
            self.finish_reason, self.finished = "stop", True
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class Draft:
    """A user's text, its part A, and the spans filled so far."""

    def __init__(self, text: str, ids: list[int], tokenizer: Tokenizer, generator: torch.Generator) -> None:
        pieces = split_text(text)
        if len(pieces) == 1:
            pieces += ["[gMASK]", ""]
        self.ids = ids
        """Part A: blanks that are still open are mask tokens, the others hold what the model wrote."""
        self.spans: list[Span] = []
        self.generator = generator
        self._tokenizer = tokenizer
        self._texts = pieces[::2]
        self.before = self._texts[0]
        """The text up to the next open blank, answers included."""

    @property
    def blanks(self) -> int:
        """Blanks in all."""
        return len(self._texts) - 1

    @property
    def pending(self) -> bool:
        """Whether a blank is still open."""
        return len(self.spans) + 1 < len(self._texts)

    @property
    def text(self) -> str:
        """The filled text, once nothing is pending."""
        return self.before

    def mask_index(self, special: Mapping[str, int]) -> int:
        """Where the next blank stands in part A."""
        found = first_blank(self.ids, special)
        assert found is not None
        return found[0]

    def place(self, answer: Answer, kind: str, mask_index: int) -> None:
        """Put an answer into the next open blank."""
        ids = answer.tokens if answer.finish_reason != "stop" else self._tokenizer.encode(answer.gap + answer.text)
        self.ids = [*self.ids[:mask_index], *ids, *self.ids[mask_index + 1 :]]
        start = len(self.before)
        self.spans.append(
            Span(
                answer.text,
                tuple(answer.tokens),
                tuple(answer.log_probabilities),
                answer.finish_reason,
                kind,
                start,
                start + len(answer.text),
            )
        )
        self.before += answer.text + self._texts[len(self.spans)]
