"""Which source, which objective, which words: sample number i of a run, a pure function of (seed, i).

Nothing here has a state, so a run that goes on after an interruption, or on another number of processes, sees the same
samples. Objectives and layouts are `infilling.py`'s.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openglm import infilling
from openglm.data.shards import Shard
from openglm.errors import DataError
from openglm.infilling import Layout
from openglm.tokenizers.base import Tokenizer

#: Documents of fewer tokens, their eos included, are passed over.
SHORTEST = 4


@dataclass(frozen=True)
class Objectives:
    """Shares and sizes of the training samples (SPEC 3.4.1)."""

    window: int = 512
    long_window: int = 1024
    """Window of a ``long_share`` of the [gMASK] samples."""
    long_share: float = 0.1
    generation_share: float = 0.7
    """Share of [gMASK] among the samples of running text; the rest is [MASK]."""
    instruction_share: float = 0.05
    """Share of instructions, in tokens."""
    mask_ratio: float = 0.15
    mean_span: float = 3.0
    least_generation_ratio: float = 0.2
    single_span_share: float = 0.02
    short_share: float = 0.02
    """Share of [MASK] samples cut to a random length, so that short texts are known, too."""


@dataclass(frozen=True)
class Sample:
    """One laid-out training sample and what it is made of."""

    layout: Layout
    objective: str
    """"[MASK]", "[gMASK]" or "instruction"."""
    language: str


def sentence_starts(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """bool ``[vocabulary]``: a sentence may begin behind this token (it ends with . ! ? 。！？ … or a newline)."""
    ends = np.zeros(vocab_size, dtype=bool)
    for token in range(tokenizer.vocab_size):
        ends[token] = tokenizer.decode([token]).rstrip(" ”’\"'）)」』").endswith((".", "!", "?", "。", "！", "？", "…", "\n"))
    return ends


class Mixture:
    """Draws samples from shards. ``weights``: pattern of shard names to factor on its token count (first match wins)."""

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: Tokenizer,
        objectives: Objectives,
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.seed, self.objectives = seed, objectives
        self.special = tokenizer.special_tokens
        self.ends = sentence_starts(tokenizer, max(tokenizer.vocab_size, 1 << 16))
        self.texts = [shard for shard in shards if shard.info.kind == "text"]
        self.instructions = [shard for shard in shards if shard.info.kind == "instructions"]
        if not self.texts:
            raise DataError("the training data holds no running text")
        self._text_shares = self._shares(self.texts, weights or {})
        drawn = [shard for shard, share in zip(self.texts, np.diff(self._text_shares, prepend=0.0), strict=True) if share > 0]
        if not any((np.diff(shard.offsets) >= SHORTEST).any() for shard in drawn):
            raise DataError(f"the training data holds no document of {SHORTEST} tokens or more")
        self._instruction_shares = self._shares(self.instructions, weights or {}) if self.instructions else None
        self._instruction_chance = 0.0
        if self.instructions and objectives.instruction_share > 0:
            # The share is counted in tokens, so measure how long the two sorts of sample are.
            rng = np.random.default_rng(seed)
            text = np.mean([len(self._text_sample(rng).layout) for _ in range(300)])
            instruction = np.mean([len(self._instruction_sample(rng).layout) for _ in range(300)])
            share = objectives.instruction_share
            self._instruction_chance = float(share / instruction / (share / instruction + (1 - share) / text))

    @staticmethod
    def _shares(shards: Sequence[Shard], weights: Mapping[str, float]) -> np.ndarray:
        def factor(name: str) -> float:
            return next((weight for pattern, weight in weights.items() if fnmatch.fnmatch(name, pattern)), 1.0)

        sizes = np.asarray([shard.info.tokens * factor(shard.info.name) for shard in shards], dtype=np.float64)
        if not sizes.sum() > 0:
            raise DataError("every source of the training data has weight 0")
        return np.cumsum(sizes / sizes.sum())

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of the run."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        if rng.random() < self._instruction_chance:
            return self._instruction_sample(rng)
        return self._text_sample(rng)

    def target_counts(self, samples: int, vocab_size: int) -> np.ndarray:
        """How often each token is a target in the first samples, int64 ``[vocab_size]``."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(samples):
            targets = self.sample(number).layout.targets
            if targets is not None:
                counts += np.bincount(targets[targets != infilling.NO_TARGET], minlength=vocab_size)
        return counts

    def _text_sample(self, rng: np.random.Generator) -> Sample:
        o = self.objectives
        shard = self.texts[int(np.searchsorted(self._text_shares, rng.random(), side="right"))]
        # A document is drawn in proportion to its tokens (SPEC 3.4.2).
        place = int(rng.integers(shard.info.tokens))
        document = shard.document(int(np.searchsorted(shard.offsets, place, side="right")) - 1)
        if len(document) < SHORTEST:
            return self._text_sample(rng)
        if rng.random() < o.generation_share:
            window = o.long_window if rng.random() < o.long_share else o.window
            tokens = self._cut(document, window - 1, rng)
            least = max(int(o.least_generation_ratio * len(tokens)), 1)
            masked = int(rng.integers(least, len(tokens) + 1))
            return Sample(infilling.generation_sample(tokens, masked, self.special), "[gMASK]", shard.info.language)
        window = o.window
        if rng.random() < o.short_share:
            window = int(rng.integers(16, o.window))
        body = document[:-1]  # without its eos: an end of text is never masked, and every part A gets one, as in inference
        length, spans = infilling.draw_spans(
            len(body),
            window - 1,
            rng,
            ratio=o.mask_ratio,
            mean=o.mean_span,
            single=rng.random() < o.single_span_share,
        )
        tokens = self._cut(body, length, rng)
        starts = infilling.place_spans(len(tokens), spans, rng)
        text = np.append(tokens, self.special["eos"])
        order = rng.permutation(len(spans))
        layout = infilling.blank_sample(text, starts, spans, self.special, order=order)
        return Sample(layout, "[MASK]", shard.info.language)

    def _instruction_sample(self, rng: np.random.Generator) -> Sample:
        assert self._instruction_shares is not None
        shard = self.instructions[int(np.searchsorted(self._instruction_shares, rng.random(), side="right"))]
        index = 2 * int(rng.integers(shard.info.documents // 2))
        layout = infilling.answer_sample(shard.document(index), shard.document(index + 1), self.objectives.window, self.special)
        return Sample(layout, "instruction", shard.info.language)

    def _cut(self, document: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
        """At most ``length`` tokens of a document, beginning at a sentence where one begins near the drawn place."""
        if len(document) <= length:
            return np.asarray(document, dtype=np.int64)
        start = int(rng.integers(len(document) - length + 1))
        if start:
            # Look back: a sentence that began up to 64 tokens earlier leaves the length as it is.
            near = np.flatnonzero(self.ends[document[max(start - 64, 0) : start]])
            if len(near):
                start = max(start - 64, 0) + int(near[-1]) + 1
        return np.asarray(document[start : start + length], dtype=np.int64)
