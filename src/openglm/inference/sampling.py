"""How a token is chosen: the settings a user gives, the filters of SPEC 5.3 in their order, and the draw."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openglm.errors import InputError

#: A forbidden logit: the lowest float16, as in the original. Its probability is 0 in float32 as well.
FORBIDDEN = -65504.0


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are written. Raises ``InputError`` naming the option and its value."""

    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens and their ties; 0 = off."""
    top_p: float = 0.0
    """Keep the likeliest tokens until their sum exceeds p; 0 = off."""
    repetition_penalty: float = 1.0
    """Tokens that the answer holds already: positive logits are divided by it, negative ones multiplied."""
    greedy: bool = True
    """Always take the likeliest token; the other settings above then have no effect, the penalty apart."""
    num_beams: int = 1
    """Above 1: beam search (SPEC 5.4), which is deterministic and has no use for the settings above."""
    length_penalty: float = 1.0
    """Beam search: a score is divided by ((5 + length) / 6) to this power, prompt included; larger favours longer."""
    no_repeat_ngram_size: int = 0
    """Beam search: no answer repeats a run of so many tokens; 0 and 1 = off."""
    min_tokens: int = 0
    """An answer may not end before it has so many tokens."""
    max_tokens: int = 64
    """Tokens of one answer at most, the end token included."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else stands in the batch."""
    deterministic: bool | None = None
    """No bit of an answer depends on what else stands in the batch; None: where there is a seed. Quantized networks in the CPU
    kernels are so at no cost; others compute each text by itself then."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _check(isinstance(stop, list | tuple), "stop", stop, "a text or a list of texts")
        object.__setattr__(self, "stop", tuple(stop))
        _check(_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(_whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number of at least 0 (0 = off)")
        _check(_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1 (0 = off)")
        penalty = self.repetition_penalty
        _check(_number(penalty) and penalty > 0, "repetition_penalty", penalty, "above 0 (1 = off)")
        _check(_number(self.length_penalty), "length_penalty", self.length_penalty, "a number (0 = off)")
        _check(_whole(self.num_beams) and self.num_beams >= 1, "num_beams", self.num_beams, "a whole number of at least 1")
        _check(
            _whole(self.no_repeat_ngram_size) and self.no_repeat_ngram_size >= 0,
            "no_repeat_ngram_size",
            self.no_repeat_ngram_size,
            "a whole number of at least 0 (0 = off)",
        )
        _check(_whole(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "a whole number of at least 0")
        _check(_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "a whole number of at least 1")
        _check(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _check(self.seed is None or _whole(self.seed), "seed", self.seed, "a whole number")
        _check(self.deterministic in (None, True, False), "deterministic", self.deterministic, "True, False or None")
        _check(all(isinstance(text, str) and text for text in stop), "stop", self.stop, "texts that are not empty")

    @classmethod
    def of(cls, settings: SamplingSettings | None = None, **options: Any) -> SamplingSettings:
        """Settings from keyword arguments, over ``settings`` where given.

        Without ``greedy``, naming temperature, top_k or top_p means sampling. An unknown option raises ``InputError``.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise InputError(f"there is no option `{name}`", hint=f"options: {', '.join(names)}", key=name)
        if "greedy" not in options and {"temperature", "top_k", "top_p"} & options.keys():
            options["greedy"] = False
        return dataclasses.replace(settings or cls(), **options)

    @property
    def draws(self) -> bool:
        """True if chance has a say."""
        return not self.greedy and self.num_beams == 1 and self.temperature > 0 and self.top_k != 1


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise InputError(f"`{name}` must be {expected}, not {value!r}", key=name)


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    top_k: int = 0,
    top_p: float = 0.0,
) -> Tensor:
    """Logits ``[..., v]`` whose softmax is the distribution to draw from (SPEC 5.3, steps 1 to 4, in that order).

    ``forbidden``: bool ``[v]`` or ``[..., v]``, True = never. Top-k keeps the ties of the k-th largest value. Top-p is
    computed on what top-k left; a token goes if those ranked before it already exceed p, so the first always stays.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, FORBIDDEN)
    size = logits.shape[-1]
    if 0 < top_k < size:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], FORBIDDEN)
    if top_p > 0:
        probabilities = logits.softmax(-1)
        # Sorting a whole vocabulary costs a millisecond; the head nearly always holds all that stays.
        for ranks in (min(256, size), size):
            top, index = probabilities.topk(ranks)
            before = torch.cat([torch.zeros_like(top[..., :1]), top.cumsum(-1)[..., :-1]], dim=-1)
            if ranks == size or bool((before[..., -1] > top_p).all()):
                break
        kept = logits.gather(-1, index).masked_fill(before > top_p, FORBIDDEN)
        logits = torch.full_like(logits, FORBIDDEN).scatter(-1, index, kept)
    return logits


def penalize(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Make tokens that were written (bool, the shape of ``logits``) less likely."""
    return torch.where(written, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token of each row's softmax, int64 ``[b]``: the inverse of the running sum, at one number of the row's own
    generator. A row's draw therefore depends neither on its companions nor on the device."""
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    total = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(total, (uniform[:, None] * total[:, -1:]), right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def make_generator(seed: int | None) -> torch.Generator:
    """The generator of one text, on the CPU; without a seed it starts anywhere."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator
