"""The class ``GLM``: text in, text out. Sequences come from ``infilling``, tokens from ``Engine`` and ``beam_search``."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openglm.checkpoints import network_from_state
from openglm.config import ModelConfig
from openglm.errors import InputError, UnlearnedMaskError
from openglm.inference.beam import BeamWriter, beam_search
from openglm.inference.engine import Engine
from openglm.inference.results import ChoiceScore, FillResult, GenerateResult, ScoreResult
from openglm.inference.sampling import SamplingSettings
from openglm.inference.scheduler import Request, Scheduler, Token
from openglm.inference.writing import Answer, Draft, unwritable_ids
from openglm.infilling import blank_prompt, choice_layout, encode_text, mask_kind, split_text
from openglm.models.glm130b import GLM130B
from openglm.tokenizers.base import MASK_WORDS, Tokenizer


class GLM:
    """A model ready for use. Sampling options are those of ``SamplingSettings``, given as keyword arguments.

    ``config``, ``tokenizer`` (None if the model has none), ``network`` (``network(tokens, positions, mask)`` gives
    logits), ``engine``, ``notes`` (what the loader deduced or ignored).
    """

    def __init__(self, network: GLM130B, tokenizer: Tokenizer | None = None, notes: Sequence[str] = ()) -> None:
        self.network = network
        self.config = network.config
        self.tokenizer = tokenizer
        self.engine = Engine(network)
        self.notes = [*notes, *self.engine.notes]
        special = self.config.special_tokens
        self._ends = (special["eop"], special["eos"])
        self._unwritable = None if tokenizer is None else unwritable_ids(self.config, tokenizer).to(self.engine.device)

    @classmethod
    def from_state(
        cls,
        config: ModelConfig | Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        dtype: str | torch.dtype = "float32",
        tokenizer: Tokenizer | None = None,
    ) -> GLM:
        """A model from tensors under the released names (SPEC 4.3), with or without ``transformer.``; they are copied.

        Raises ``CheckpointError`` naming a missing, unknown or misshaped tensor, ``ConfigError`` for a bad ``config``,
        ``TokenizerError`` for a tokenizer of another model.
        """
        config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        return cls(network_from_state(config, tensors, dtype).requires_grad_(False), tokenizer)

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def fill(self, text: str, *, settings: SamplingSettings | None = None, **options: Any) -> FillResult:
        """Fill every blank of a text, from left to right whatever its kind, each seeing the answers before it.

        A text without a blank gets a ``[gMASK]`` at its end. Raises ``InputError`` for an empty text, an option that
        makes no sense or a text that leaves no room, ``UnlearnedMaskError`` for a mask kind the model does not know.
        """
        return self.fill_batch([text], settings=settings, **options)[0]

    def fill_batch(
        self, texts: Sequence[str], *, batch_size: int = 8, settings: SamplingSettings | None = None, **options: Any
    ) -> list[FillResult]:
        """``fill`` for many texts, ``batch_size`` side by side; the results are those of each text alone."""
        chosen = SamplingSettings.of(settings, **options)
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, not {batch_size!r}", key="batch_size")
        drafts = self._drafts(texts, chosen)
        for _ in self._write(drafts, chosen, batch_size):
            pass
        return [FillResult(draft.text, tuple(draft.spans)) for draft in drafts]

    def generate(self, text: str, *, settings: SamplingSettings | None = None, **options: Any) -> GenerateResult:
        """Write one answer: at the text's end (``[gMASK]`` is appended), or at its one blank. Raises as ``fill``."""
        return self.generate_batch([text], settings=settings, **options)[0]

    def generate_batch(
        self, texts: Sequence[str], *, batch_size: int = 8, settings: SamplingSettings | None = None, **options: Any
    ) -> list[GenerateResult]:
        """``generate`` for many texts, ``batch_size`` side by side; the results are those of each text alone."""
        for text in texts:
            _refuse_several_blanks(text, "generate")
        results = self.fill_batch(texts, batch_size=batch_size, settings=settings, **options)
        return [
            GenerateResult(result.text, span.text, span.token_ids, span.log_probabilities, span.finish_reason)
            for result in results
            for span in result.spans
        ]

    def stream(self, text: str, *, settings: SamplingSettings | None = None, **options: Any) -> Iterator[str]:
        """The answer of ``generate``, piece by piece as it is written. Raises as ``fill``, before the first piece.

        Never half a character, and nothing that may turn out to begin a stop string. Beam search answers at its end.
        """
        _refuse_several_blanks(text, "stream")
        chosen = SamplingSettings.of(settings, **options)
        drafts = self._drafts([text], chosen)
        return (piece for piece in self._write(drafts, chosen) if piece)

    def score(self, context: str, choices: Sequence[str]) -> ScoreResult:
        """How likely each choice is at the one blank of a context (``[gMASK]`` is appended when there is none).

        All choices are read in one pass and do not see each other (SPEC 3.3). A choice stands as typed; behind a blank
        (" [MASK]") it brings that blank along, as an answer does. End tokens are not counted. Raises
        ``InputError`` for several blanks, no or an empty choice, and what does not fit the context; else as ``fill``.
        """
        tokenizer = self._need_tokenizer()
        if isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise InputError("`choices` must be a list of at least one text", key="choices")
        _refuse_several_blanks(context, "score")
        self._check_text(context)
        pieces = split_text(context)
        gap = " " if pieces[0].endswith(" ") else ""
        ids = encode_text(context, tokenizer)
        kind = mask_kind(ids, self.config.special_tokens)
        options = []
        for choice in choices:
            options.append(tokenizer.encode(choice if choice.startswith(" ") else gap + choice))
            if not choice.strip() or not options[-1]:
                raise InputError("a choice is empty", key="choices")
            self._room(len(ids) + len(options[-1]))
        assert kind is not None  # encode_text sees to it
        scored: list[ChoiceScore] = []
        for group in _groups([len(option) for option in options], max(self.config.max_sequence_length, 512)):
            layout, rows = choice_layout(ids, [options[i] for i in group], self.config.special_tokens, kind)
            logs = self.engine.log_probabilities(layout, [int(row) for part in rows for row in part])
            targets = [token for i in group for token in options[i]]
            values = iter(logs[range(len(targets)), targets].tolist())
            for i in group:
                own = tuple(next(values) for _ in options[i])
                scored.append(ChoiceScore(choices[i], sum(own), len(own), own))
        best = max(range(len(scored)), key=lambda i: scored[i].log_probability)
        return ScoreResult(best, tuple(scored))

    # -----------------------------------------------------------------------------------------------------------------
    # Ids

    def fill_ids(
        self,
        ids: Sequence[int],
        search: str = "greedy",
        num_beams: int = 4,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        min_tokens: int = 0,
        max_length: int = 64,
        consider_end: bool = True,
    ) -> list[list[list[int]]]:
        """Fill blanks of one kind as the original does (SPEC 3.2, 5.4, 5.5), which forbids no id and knows no text.

        ids: part A with its mask ids, the closing ``eos`` included where there is one, no ``sop``. search: "greedy" or
        "beam" (one beam is not greedy). max_length counts the whole sequence: part A, ``sop`` and the answer.

        Returns, for each beam and best first, a list of answers, one for each blank, end token dropped. With several
        blanks only beam 0's answer goes on into the next one; beam i's list holds the i-th answer of each round.
        Raises ``InputError`` for ids outside the vocabulary or without a blank, and where ``max_length`` leaves no room.
        """
        current = self._checked_ids(ids)
        if search not in ("greedy", "beam"):
            raise InputError(f'`search` must be "greedy" or "beam", not {search!r}', key="search")
        settings = SamplingSettings.of(
            num_beams=num_beams,
            length_penalty=length_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            min_tokens=min_tokens,
            max_tokens=max(max_length, min_tokens, 1),
        )
        special = self.config.special_tokens
        kind = mask_kind(current, special)
        if kind is None:
            raise InputError(f"the ids hold no blank ({', '.join(str(special[word]) for word in MASK_WORDS)})", key="ids")
        rounds: list[list[list[int]]] = []
        seen: set[tuple[int, ...]] = set()
        # An answer may itself hold the mask, which is then filled in turn; where that leads in a circle, it ends.
        while special[kind] in current and tuple(current) not in seen:
            seen.add(tuple(current))
            index = current.index(special[kind])
            prompt = blank_prompt(current, index, special)
            room = max_length - len(prompt.layout)
            if room < 1:
                raise InputError(
                    f"`max_length` is {max_length}, but the sequence has {len(prompt.layout)} tokens already", key="max_length"
                )
            if search == "greedy":
                written = [token.id for token in self.engine.generate([prompt], settings, ends=self._ends, rooms=[room])]
                answers = [written]
            else:
                result = beam_search(
                    self.engine,
                    [prompt],
                    ends=self._ends,
                    rooms=[room],
                    num_beams=num_beams,
                    length_penalty=length_penalty,
                    no_repeat_ngram_size=no_repeat_ngram_size,
                    min_tokens=min_tokens,
                    consider_end=consider_end,
                )[0]
                answers = [list(answer.tokens) for answer in result.answers]
            answers = [answer[:-1] if answer[-1] in self._ends else answer for answer in answers]
            rounds.append(answers)
            current = [*current[:index], *answers[0], *current[index + 1 :]]
        return [list(beam) for beam in zip(*rounds, strict=True)]

    # -----------------------------------------------------------------------------------------------------------------
    # How

    def _write(self, drafts: Sequence[Draft], settings: SamplingSettings, batch_size: int = 1) -> Iterator[str]:
        """Fill all blanks of all drafts, ``batch_size`` drafts side by side: one that is done makes room for the next.

        Yields pieces of text (of all drafts) as they come.
        """
        width = settings.num_beams
        needs = sorted((self._columns(draft, settings) for draft in drafts), reverse=True)
        scheduler = self.engine.scheduler(sum(needs[:batch_size]), most_rows=width * batch_size)
        try:
            yield from self._write_with(scheduler, drafts, settings, batch_size)
        finally:
            scheduler.close()

    def _write_with(
        self, scheduler: Scheduler, drafts: Sequence[Draft], settings: SamplingSettings, batch_size: int
    ) -> Iterator[str]:
        coming = iter(drafts)
        open_blanks = {draft: self._begin(draft, settings, scheduler) for draft in itertools.islice(coming, batch_size)}
        while open_blanks:
            tokens: dict[int, list[Token]] = {}
            for token in scheduler.step():
                tokens.setdefault(token.row, []).append(token)
            for draft, (request, answer) in list(open_blanks.items()):
                yield from _push(answer, tokens.get(request.number, ()))
                if request.done and isinstance(request.writer, BeamWriter):
                    yield from _push(answer, request.writer.result().answers[0].as_tokens(self._ends))
                if not request.done and not answer.finished:
                    continue
                scheduler.cancel(request)
                yield answer.flush()
                draft.place(answer, request.prompt.kind, request.prompt.mask_index)
                del open_blanks[draft]
                following = draft if draft.pending else next(coming, None)
                if following is not None:
                    open_blanks[following] = self._begin(following, settings, scheduler)

    def _begin(self, draft: Draft, settings: SamplingSettings, scheduler: Scheduler) -> tuple[Request, Answer]:
        """Ask for the next blank of a draft."""
        special = self.config.special_tokens
        prompt = blank_prompt(draft.ids, draft.mask_index(special), special)
        room = min(settings.max_tokens, self._room(len(prompt.layout)))
        writer = None
        if settings.num_beams > 1:
            writer = BeamWriter(
                prompt.layout.tokens.tolist(),
                room,
                ends=self._ends,
                num_beams=settings.num_beams,
                length_penalty=settings.length_penalty,
                no_repeat_ngram_size=settings.no_repeat_ngram_size,
                min_tokens=settings.min_tokens,
                forbidden=self._unwritable,
            )
        request = Request(prompt, settings, self._ends, room, draft.generator, self._unwritable, writer)
        return scheduler.submit(request), Answer(self._need_tokenizer(), settings.stop, draft.before)

    def _columns(self, draft: Draft, settings: SamplingSettings) -> int:
        """Columns of the cache that a draft's blanks need at most, one after the other."""
        limit = self.config.max_sequence_length
        last = min(len(draft.ids) + 1 + (draft.blanks - 1) * settings.max_tokens, limit)
        first = len(draft.ids) + 1
        widest = min(max(first, limit - settings.max_tokens), last)  # the longest prompt that leaves all the room there is
        return max(length + settings.num_beams * min(settings.max_tokens, limit - length) for length in (first, widest, last))

    def _drafts(self, texts: Sequence[str], settings: SamplingSettings) -> list[Draft]:
        if isinstance(texts, str):
            raise InputError("a batch is a list of texts, not one text", key="texts")
        tokenizer = self._need_tokenizer()
        drafts = []
        for number, text in enumerate(texts):
            try:
                self._check_text(text)
                draft = Draft(text, encode_text(text, tokenizer), tokenizer, self.engine.generator(settings))
                self._room(len(draft.ids) + 1)
            except InputError as error:
                if len(texts) > 1:
                    raise type(error)(f"text {number + 1}: {error.message}", hint=error.hint, key=error.key) from error
                raise
            drafts.append(draft)
        return drafts

    def _check_text(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise InputError("the text is empty", hint="give a text, with [MASK] where something is missing")
        learned = self.config.learned_masks
        for kind in split_text(text)[1::2] or ["[gMASK]"]:
            if kind not in learned:
                raise UnlearnedMaskError(
                    f"this model has not learned {kind}, it knows {' and '.join(learned) or 'no mask'}",
                    hint=f"write {learned[0]} instead" if learned else None,
                )

    def _room(self, length: int) -> int:
        """Tokens that fit behind a sequence of ``length``, ``sop`` included."""
        limit = self.config.max_sequence_length
        if length >= limit:
            raise InputError(
                f"the text takes {length} tokens, which leaves no room for an answer: this model has a context of {limit}",
                hint="shorten the text",
            )
        return limit - length

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        try:
            checked = [operator.index(token) for token in ids]
        except TypeError as error:
            raise InputError("`ids` must be whole numbers", key="ids") from error
        for token in checked:
            if not 0 <= token < self.config.vocab_size:
                raise InputError(f"id {token} is outside the vocabulary of {self.config.vocab_size}", key="ids")
        return checked

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so it cannot read text",
                hint="put the tokenizer's file into its folder, or load it with tokenizer=FILE",
            )
        return self.tokenizer


def _refuse_several_blanks(text: str, method: str) -> None:
    count = len(split_text(text)) // 2 if isinstance(text, str) else 0
    if count > 1:
        raise InputError(f"`{method}` takes a text with one blank at most, not {count}", hint="use `fill`")


def _push(answer: Answer, tokens: Iterable[Token]) -> Iterator[str]:
    for token in tokens:
        if not answer.finished:
            yield answer.push(token.id, token.log_probability, token.ends)


def _groups(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in order, in runs whose lengths sum to ``limit`` at most."""
    group: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if group and total + length > limit:
            yield group
            group, total = [], 0
        group.append(index)
        total += length
    yield group
