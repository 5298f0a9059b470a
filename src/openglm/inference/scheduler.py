"""Continuous batching: requests of all kinds and lengths side by side, each joining when there is room, leaving when it ends.

A request is written by a ``Writer``: greedily or by draws (one sequence), or by beam search (several). In every step all
sequences that live are fed their next tokens in one pass, whatever their prompts and settings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from openglm.errors import BusyError, InputError
from openglm.inference.sampling import FORBIDDEN, SamplingSettings, draw, filter_logits, penalize
from openglm.infilling import Prompt

if TYPE_CHECKING:
    from openglm.inference.engine import Engine
    from openglm.inference.speculation import Drafter


@dataclass(frozen=True)
class Token:
    """One new token of one request."""

    row: int
    """The request's number."""
    id: int
    log_probability: float
    """Of the network's own distribution: log-softmax of the logits before any penalty, temperature or filter."""
    ends: bool
    """True if the request ends with it: an end token."""


@dataclass
class Choice:
    """How a request goes on."""

    parents: list[int]
    """For each of its next sequences, which of the present ones it continues; none: the request is done."""
    tokens: list[int]
    """The token that each of them is fed."""


class Writer(Protocol):
    """Chooses a request's tokens from the logits of its sequences."""

    width: int
    """Sequences it may need at once."""

    def choose(self, logits: Tensor) -> Choice:
        """From logits ``[sequences, v]``: at first one sequence, the prompt's."""
        ...


@dataclass(eq=False)
class Request:
    """A prompt and how it is to be answered. ``tokens`` grows as the request is written by steps of a scheduler."""

    prompt: Prompt
    settings: SamplingSettings
    ends: Sequence[int]
    """Tokens that end the answer."""
    room: int
    """New tokens at most, the end token included."""
    generator: torch.Generator | None = None
    """For draws."""
    forbidden: Tensor | None = None
    """bool ``[v]``: ids that are never written."""
    writer: Writer | None = None
    """Of several sequences; None: one sequence, greedily or by draws."""
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def width(self) -> int:
        """Sequences it may need at once."""
        return 1 if self.writer is None else self.writer.width

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn."""
        return not self.settings.greedy and self.settings.temperature > 0


class Scheduler:
    """Runs requests over one pool of cache columns.

    ``columns``: of the pool; a request takes those of its prompt and of its room when it begins, so that what has begun can be
    finished. ``most_rows``: sequences at once. ``most_waiting``: requests in the queue before ``submit`` refuses more.
    ``drafter`` proposes tokens that are then checked several at once; what is written stays the same.
    """

    def __init__(
        self,
        engine: Engine,
        columns: int,
        *,
        most_rows: int = 256,
        most_waiting: int | None = None,
        padding: str = "right",
        drafter: Drafter | None = None,
    ) -> None:
        self._engine = engine
        self._decoding = engine.decoding(columns, padding=padding)
        self._most_rows, self._most_waiting = most_rows, most_waiting
        self._drafter = drafter
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._owners: list[Request] = []  # of each row
        self._written: dict[Request, Tensor] = {}  # bool [v], for repetition penalties
        self._next: list[int] | None = None  # tokens that the rows are fed in the next step
        self._ahead: Tensor | None = None  # [rows, s, v]: logits behind each token fed, where some were proposed
        self._found: list[Token] = []  # what the next step returns
        self._count = 0
        self.proposed = self.accepted = 0
        """Tokens that the drafter proposed, and that were right."""

    # -----------------------------------------------------------------------------------------------------------------
    # Requests

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being written."""
        return len(self._running)

    def submit(self, request: Request) -> Request:
        """Put a request into the queue. Raises ``InputError`` if it can never fit, ``BusyError`` if the queue is full."""
        if request.sampling and request.writer is None and request.generator is None:
            raise InputError("drawing needs a generator")
        needed = len(request.prompt.layout) + request.width * request.room
        if needed > self._decoding.pool.columns or request.width > self._most_rows:
            raise InputError(
                f"the request needs {needed} columns of the cache and {request.width} sequences, there are "
                f"{self._decoding.pool.columns} and {self._most_rows}",
                hint="shorten the text, ask for fewer tokens or beams, or give the cache more memory",
            )
        if self._most_waiting is not None and len(self._waiting) >= self._most_waiting:
            raise BusyError(f"{len(self._waiting)} requests are waiting already", hint="try again later")
        request.number = self._count
        self._count += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Write nothing more for it; its memory is free with the next step."""
        request.done = True

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Write one token of everything that runs (or more, where proposals were right), and begin what fits then.

        Requests with a writer of their own give no tokens; they are ``done`` when it is. Where a pass raises, nothing is lost:
        a later step goes on from where this one began.
        """
        with self._engine.one_thread():
            self._drop_done()
            if self._owners and self._next is not None:
                self._choose(self._feed(), 0)
            if new := self._admit():
                self._choose([], len(self._owners) - new)
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Give up whatever runs or waits, and all memory."""
        for request in (*self._waiting, *self._running):
            request.done = True
        self._drop_done()
        self._decoding.release()

    def run(self) -> Iterator[Token]:
        """All tokens of all requests, until nothing is left."""
        try:
            while self._waiting or self._running:
                yield from self.step()
        finally:
            self.close()

    def _drop_done(self) -> None:
        """Take cancelled requests out."""
        self._waiting = deque(request for request in self._waiting if not request.done)
        if any(request.done for request in self._running):
            kept = [index for index, request in enumerate(self._owners) if not request.done]
            self._keep(kept, None if self._next is None else [self._next[index] for index in kept])

    def _keep(self, rows: list[int], tokens: list[int] | None) -> None:
        self._owners = [self._owners[index] for index in rows]
        self._decoding.select(rows)
        self._next = tokens
        for request in self._running:
            if request.done:
                self._written.pop(request, None)
                if self._drafter is not None:
                    self._drafter.forget(request)
        self._running = [request for request in self._running if not request.done]

    def _admit(self) -> int:
        """Read the prompts of requests that fit, in the order of their coming; how many rows are new."""
        begun: list[Request] = []
        decoding = self._decoding
        rows = sum(request.width for request in self._running)
        while self._waiting:
            group = [*begun, self._waiting[0]]
            rows += group[-1].width
            if rows > self._most_rows or not decoding.pool.fits(decoding.needs(*self._wishes(group))):
                break
            begun.append(self._waiting.popleft())
        if begun:
            try:
                decoding.add(*self._wishes(begun))
            except BaseException:
                self._waiting.extendleft(reversed(begun))
                raise
            self._owners += begun
            self._running += begun
        return len(begun)

    def _wishes(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[int], list[int], list[bool]]:
        return (
            [request.prompt for request in requests],
            [request.room for request in requests],
            [request.width for request in requests],
            [self._engine.apart(request) for request in requests],
        )

    def _feed(self) -> list[list[int]]:
        """Feed every row its token, and what the drafter proposes behind it; the proposals of each row."""
        assert self._next is not None
        proposals: list[list[int]] = [[] for _ in self._owners]
        if self._drafter is not None:
            single = [(row, request) for row, request in enumerate(self._owners) if self._may_draft(row, request)]
            for (row, _), found in zip(single, self._drafter.propose([request for _, request in single]), strict=True):
                proposals[row] = found[: self._decoding.rows[row].room - 1]
        longest = max(len(found) for found in proposals)
        device = self._decoding.logits.device
        if not longest:
            self._ahead = None
            self._decoding.append(torch.tensor(self._next, device=device))
            return proposals
        fed = [[token, *found] for token, found in zip(self._next, proposals, strict=True)]
        padded = torch.tensor([row + [0] * (1 + longest - len(row)) for row in fed], device=device)
        self._ahead = self._decoding.append(padded, [len(row) for row in fed])
        self._decoding.logits = self._ahead[:, 0]
        return proposals

    def _may_draft(self, row: int, request: Request) -> bool:
        # A token alone and several at once must give the same numbers: in float32 up to 1e-5, in our kernels to the bit. Behind
        # a stop string no token may have been drawn.
        exact = self._decoding.invariant_steps or not self._engine.rounds
        drawn = request.sampling and request.settings.stop
        return exact and not drawn and request.writer is None and self._decoding.rows[row].room > 1

    def _choose(self, proposals: list[list[int]], first: int) -> None:
        """The next token of rows from ``first`` on, and the rows and tokens of the next step."""
        logits, found = self._decoding.logits, self._found
        rows_of: dict[int, list[int]] = {}  # of requests with writers, by identity
        singles: list[int] = []
        for row, request in enumerate(self._owners[first:], first):
            if request.writer is None:
                singles.append(row)
            else:
                rows_of.setdefault(id(request), []).append(row)
        chosen: dict[int, int] = {}
        for tokens, logs, part in self._sample(logits, singles):
            for row, token, log in zip(part, tokens, logs, strict=True):
                chosen[row] = token
                found.append(self._take(row, token, log))
        self._accept(proposals, chosen, found)
        kept = list(range(first))
        feed = (self._next or [])[:first]
        for row, request in enumerate(self._owners[first:], first):
            if request.writer is None:
                if not request.done:
                    kept.append(row)
                    feed.append(chosen[row])
            elif rows_of[id(request)][0] == row:
                rows = rows_of[id(request)]
                choice = request.writer.choose(logits[rows])
                request.done = not choice.parents
                kept += [rows[parent] for parent in choice.parents]
                feed += choice.tokens
        self._keep(kept, feed)

    def _take(self, row: int, token: int, log: float) -> Token:
        request = self._owners[row]
        ends = token in request.ends
        request.tokens.append(token)
        if request in self._written:
            self._written[request][token] = True
        request.done = ends or len(request.tokens) >= request.room
        return Token(request.number, token, log, ends)

    def _accept(self, proposals: list[list[int]], chosen: dict[int, int], found: list[Token]) -> None:
        """Go on in each row for as long as what was proposed is what is chosen; take the rest of the proposals back."""
        for row, proposed in enumerate(proposals):
            if not proposed:
                continue
            request, right = self._owners[row], 0
            assert self._ahead is not None
            while right < len(proposed) and chosen[row] == proposed[right] and not request.done:
                right += 1
                ((tokens, logs, _),) = self._sample(self._ahead[row, right][None], [row])
                chosen[row] = tokens[0]
                found.append(self._take(row, tokens[0], logs[0]))
            self.proposed += len(proposed)
            self.accepted += right
            self._decoding.shorten(row, len(proposed) - right)

    def _sample(self, logits: Tensor, rows: list[int]) -> Iterator[tuple[list[int], list[float], list[int]]]:
        """Tokens, log-probabilities and rows, settings by settings. Logits ``[n, v]`` of all rows, or of those named."""
        groups: dict[tuple[SamplingSettings, int], list[int]] = {}
        for row in rows:
            request = self._owners[row]
            groups.setdefault((request.settings, id(request.forbidden)), []).append(row)
        for (settings, _), part in groups.items():
            requests = [self._owners[row] for row in part]
            own = logits if len(logits) == len(part) else logits[part]
            log_probabilities = own.log_softmax(-1)
            if settings.repetition_penalty != 1.0:
                for request in requests:
                    if request not in self._written:
                        self._written[request] = torch.zeros(own.shape[1], dtype=torch.bool, device=own.device)
                own = penalize(own, torch.stack([self._written[request] for request in requests]), settings.repetition_penalty)
            forbidden = requests[0].forbidden
            early = [index for index, request in enumerate(requests) if len(request.tokens) < settings.min_tokens]
            if early:
                forbidden = torch.zeros_like(own, dtype=torch.bool) if forbidden is None else forbidden.expand_as(own).clone()
                for index in early:
                    forbidden[index, list(requests[index].ends)] = True
            if requests[0].sampling:
                own = filter_logits(
                    own, temperature=settings.temperature, forbidden=forbidden, top_k=settings.top_k, top_p=settings.top_p
                )
                generators = [request.generator for request in requests]
                tokens = draw(own, generators)  # pyright: ignore[reportArgumentType]  # submit has seen to it
            else:
                tokens = (own if forbidden is None else own.masked_fill(forbidden, FORBIDDEN)).argmax(-1)
            yield tokens.tolist(), log_probabilities.gather(1, tokens[:, None]).squeeze(1).tolist(), part
