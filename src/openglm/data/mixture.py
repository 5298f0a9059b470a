"""Which source, which objective, which words: sample number i of a run, a pure function of (seed, i).

Nothing here has a state, so a run that goes on after an interruption, or on another number of processes, sees the same
samples. Objectives and layouts are `infilling.py`'s.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from openglm import infilling
from openglm.data.schedule import Schedule, value_at, values_of
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
    """Share of [gMASK] among the samples of running text."""
    sentence_share: float = 0.0
    """Share of [sMASK], whole sentences as blanks (SPEC 3.4.4; GLM-10B had 0.3, GLM-130B none). The rest is [MASK]."""
    instruction_share: Schedule = field(default=0.05, metadata={"schedule": True})
    """Share of instructions, in tokens; a number or a schedule over samples."""
    mask_ratio: float = 0.15
    mean_span: float = 3.0
    least_generation_ratio: float = 0.2
    single_span_share: float = 0.02
    short_share: float = 0.02
    """Share of [MASK] samples cut to a random length, so that short texts are known, too."""
    unidirectional: bool = False
    """Plain language modelling, for a causal twin: every sample is [gMASK] with nothing in part A, and all of it is target."""

    @property
    def masks(self) -> tuple[str, ...]:
        """Kinds of blanks in the samples of running text: what a model learns to fill."""
        if self.unidirectional:
            return ("[gMASK]",)
        blanks = 1 - self.generation_share - self.sentence_share
        shares = {"[MASK]": blanks, "[gMASK]": self.generation_share, "[sMASK]": self.sentence_share}
        return tuple(kind for kind, share in shares.items() if share > 1e-9)


@dataclass(frozen=True)
class Sample:
    """One laid-out training sample and what it is made of."""

    layout: Layout
    objective: str
    """"[MASK]", "[sMASK]", "[gMASK]" or "instruction"."""
    language: str
    source: str
    """Name of the shard."""


def sentence_starts(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """bool ``[vocabulary]``: a sentence may begin behind this token (it ends with . ! ? 。！？ … or a newline)."""
    ends = np.zeros(vocab_size, dtype=bool)
    for token in range(tokenizer.vocab_size):
        ends[token] = tokenizer.decode([token]).rstrip(" ”’\"'）)」』").endswith((".", "!", "?", "。", "！", "？", "…", "\n"))
    return ends


class _Sources:
    """Shards, and how often each is drawn, which may change in the course of the run."""

    def __init__(self, shards: Sequence[Shard], weights: Mapping[str, Schedule], caps: Mapping[str, int]) -> None:
        def schedule(name: str) -> Schedule:
            return next((weight for pattern, weight in weights.items() if fnmatch.fnmatch(name, pattern)), 1.0)

        self.shards = list(shards)
        self._sizes = np.asarray([shard.info.tokens * _capped(shard, caps) for shard in shards], dtype=np.float64)
        self._schedules = [schedule(shard.info.name) for shard in shards]
        self._constant = None if any(isinstance(s, tuple) for s in self._schedules) else self._shares(0)

    def ever_drawn(self) -> list[Shard]:
        """Shards that hold tokens and have a weight above 0 at some time."""
        pairs = zip(self.shards, self._schedules, strict=True)
        return [shard for shard, schedule in pairs if shard.info.tokens and max(values_of(schedule)) > 0]

    def _shares(self, number: int) -> np.ndarray:
        weights = [value_at(schedule, number) for schedule in self._schedules]
        sizes = self._sizes * weights
        if len(sizes) and not sizes.sum() > 0:
            if not self.ever_drawn():
                return np.cumsum(sizes)
            raise DataError(f"every source has weight 0 at sample {number}", key="data.weights")
        return np.cumsum(sizes / sizes.sum()) if len(sizes) else sizes

    def draw(self, rng: np.random.Generator, number: int) -> Shard:
        """The source of sample ``number``."""
        shares = self._shares(number) if self._constant is None else self._constant
        return self.shards[min(int(np.searchsorted(shares, rng.random(), side="right")), len(shares) - 1)]


def _capped(shard: Shard, caps: Mapping[str, int]) -> float:
    """The part of a source that counts: at most so many of its documents (pairs, of instructions)."""
    cap = next((cap for pattern, cap in caps.items() if fnmatch.fnmatch(shard.info.name, pattern)), None)
    count = shard.info.documents // (2 if shard.info.kind == "instructions" else 1)
    return 1.0 if cap is None or count <= cap else cap / count


class Mixture:
    """Draws samples from shards.

    ``weights``: pattern of shard names to factor on its token count (first match wins). ``caps``: pattern to documents; a
    source of more is drawn as if it had only so many, as large instruction sets are capped (SPEC 3.4.6).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: Tokenizer,
        objectives: Objectives,
        *,
        seed: int,
        weights: Mapping[str, Schedule] | None = None,
        caps: Mapping[str, int] | None = None,
    ) -> None:
        self.seed, self.objectives = seed, objectives
        self.special = tokenizer.special_tokens
        self.ends = sentence_starts(tokenizer, max(tokenizer.vocab_size, 1 << 16))
        self.texts = _Sources([shard for shard in shards if shard.info.kind == "text"], weights or {}, caps or {})
        instructions = [shard for shard in shards if shard.info.kind == "instructions"]
        self.instructions = _Sources(instructions, weights or {}, caps or {})
        if not self.texts.shards:
            raise DataError("the training data holds no running text")
        if not any(shard.info.tokens for shard in self.texts.shards):
            raise DataError("the training data is empty: its sources hold no document")
        if not self.texts.ever_drawn():
            raise DataError("every source of the training data has weight 0")
        if not any((np.diff(shard.offsets) >= SHORTEST).any() for shard in self.texts.ever_drawn()):
            raise DataError(f"the training data holds no document of {SHORTEST} tokens or more")
        self._lengths = (1.0, 1.0)
        instructed = self.instructions.ever_drawn() and max(values_of(objectives.instruction_share)) > 0
        #: Kinds of blanks that the samples hold; an instruction's answer is a [MASK], too.
        self.masks = objectives.masks
        if instructed and "[MASK]" not in self.masks and not objectives.unidirectional:
            self.masks = ("[MASK]", *self.masks)
        if instructed:
            # The share is counted in tokens, so measure how long the two sorts of sample are.
            rng = np.random.default_rng(seed)
            # Always by the layouts of blanks, so that a causal twin reads the same documents.
            text = np.mean([len(self._text_sample(rng, 0, causal=False).layout) for _ in range(300)])
            instruction = np.mean([len(self._instruction_sample(rng, 0, causal=False).layout) for _ in range(300)])
            self._lengths = (float(text), float(instruction))

    def _instruction_chance(self, number: int) -> float:
        """Chance that sample ``number`` is an instruction."""
        if not self.instructions.ever_drawn():
            return 0.0
        share = value_at(self.objectives.instruction_share, number)
        text, instruction = self._lengths
        return share / instruction / (share / instruction + (1 - share) / text)

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of the run."""
        rng = np.random.Generator(np.random.Philox(key=np.asarray([self.seed, number], dtype=np.uint64)))
        causal = self.objectives.unidirectional
        if rng.random() < self._instruction_chance(number):
            return self._instruction_sample(rng, number, causal=causal)
        return self._text_sample(rng, number, causal=causal)

    def target_counts(self, samples: int, vocab_size: int) -> np.ndarray:
        """How often each token is a target in the first samples, int64 ``[vocab_size]``."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(samples):
            targets = self.sample(number).layout.targets
            if targets is not None:
                counts += np.bincount(targets[targets != infilling.NO_TARGET], minlength=vocab_size)
        return counts

    def _text_sample(self, rng: np.random.Generator, number: int, *, causal: bool) -> Sample:
        o = self.objectives
        shard = self.texts.draw(rng, number)
        # A document is drawn in proportion to its tokens (SPEC 3.4.2).
        place = int(rng.integers(shard.info.tokens))
        document = shard.document(int(np.searchsorted(shard.offsets, place, side="right")) - 1)
        if len(document) < SHORTEST:
            return self._text_sample(rng, number, causal=causal)
        objective = rng.random()
        if objective < o.generation_share or causal:
            window = o.long_window if rng.random() < o.long_share else o.window
            tokens = self._cut(document, window - 1, rng)
            least = max(int(o.least_generation_ratio * len(tokens)), 1)
            masked = len(tokens) if causal else int(rng.integers(least, len(tokens) + 1))
            return Sample(
                infilling.generation_sample(tokens, masked, self.special), "[gMASK]", shard.info.language, shard.info.name
            )
        body = document[:-1]  # without its eos: an end of text is never masked, and every part A gets one, as in inference
        if objective < o.generation_share + o.sentence_share:
            layout = self._sentence_sample(body, rng)
            if layout is not None:
                return Sample(layout, "[sMASK]", shard.info.language, shard.info.name)
        window = o.window
        if rng.random() < o.short_share:
            window = int(rng.integers(16, o.window))
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
        return Sample(layout, "[MASK]", shard.info.language, shard.info.name)

    def _sentence_sample(self, body: np.ndarray, rng: np.random.Generator) -> Layout | None:
        """Whole sentences of a text as blanks; None for a text of fewer than two, which gets blanks of words instead."""
        o = self.objectives
        tokens = self._cut(body, o.window - 3, rng)  # room for eos and one blank
        while True:
            ends = self._sentence_ends(tokens)
            if len(tokens) == len(body):  # the text ends here, and its last sentence with it
                ends = np.union1d(ends, [len(tokens)])
            if len(ends) < 2:
                return None
            starts, spans = infilling.sentence_spans(ends, len(tokens), rng, ratio=o.mask_ratio)
            over = len(tokens) + 1 + 2 * len(spans) - o.window
            if over <= 0:
                break
            tokens = tokens[:-over]  # a sample of k blanks takes 2k places more than its text
        text = np.append(tokens, self.special["eos"])
        return infilling.blank_sample(text, starts, spans, self.special, order=rng.permutation(len(spans)), kind="[sMASK]")

    def _sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Index behind each sentence; of several tokens in a row that end one, the last counts."""
        ends = self.ends[tokens]
        return np.flatnonzero(ends & ~np.append(ends[1:], False)) + 1

    def _instruction_sample(self, rng: np.random.Generator, number: int, *, causal: bool) -> Sample:
        shard = self.instructions.draw(rng, number)
        index = 2 * int(rng.integers(shard.info.documents // 2))
        prompt, answer = shard.document(index), shard.document(index + 1)
        window = self.objectives.window
        if causal:
            prompt, answer, cut = infilling.fit_answer(prompt, answer, window)
            tokens = np.concatenate([prompt, answer, [] if cut else [self.special["eos"]]]).astype(np.int64)
            layout = infilling.generation_sample(tokens, len(tokens), self.special)
        else:
            layout = infilling.answer_sample(prompt, answer, window, self.special)
        return Sample(layout, "instruction", shard.info.language, shard.info.name)

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
