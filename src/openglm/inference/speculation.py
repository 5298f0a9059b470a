"""Proposals of tokens to come, which the network then checks several at once: the text stays what it is, for each token is
still chosen from the network's own scores, and what was proposed beyond the first difference is taken back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from openglm.errors import InputError

if TYPE_CHECKING:
    from openglm.inference.decoding import Decoding
    from openglm.inference.engine import Engine
    from openglm.inference.scheduler import Request


class Drafter(Protocol):
    """Proposes how requests go on."""

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        """For each request the tokens that may follow what it has written; none where there is no idea."""
        ...

    def forget(self, request: Request) -> None:
        """The request is over."""
        ...


class LookupDrafter:
    """Proposes what followed the last time that the same tokens stood in the text or in the answer.

    It costs nothing, and pays where an answer repeats what it was given: names, tables, code, quotations.
    """

    def __init__(self, count: int = 6, longest: int = 3, shortest: int = 2) -> None:
        if count < 1 or not 1 <= shortest <= longest:
            raise InputError("a lookup needs a count of at least 1, and 1 <= shortest <= longest")
        self.count, self.longest, self.shortest = count, longest, shortest

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens behind the latest earlier place of the last ``longest`` tokens, or of fewer, down to ``shortest``."""
        return [self._find([*request.prompt.layout.tokens.tolist(), *request.tokens]) for request in requests]

    def _find(self, text: list[int]) -> list[int]:
        for size in range(self.longest, self.shortest - 1, -1):
            end = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == end:
                    return text[start + size : start + size + self.count]
        return []

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


class ModelDrafter:
    """Proposes what a smaller model of the same vocabulary would write, greedily."""

    def __init__(self, engine: Engine, count: int = 4) -> None:
        if count < 1:
            raise InputError("a draft has at least 1 token")
        self.engine, self.count = engine, count
        self._drafts: weakref.WeakKeyDictionary[Request, Decoding] = weakref.WeakKeyDictionary()

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        """``count`` tokens for each request."""
        return [self._write(request) for request in requests]

    def _write(self, request: Request) -> list[int]:
        length = len(request.prompt.layout) + len(request.tokens) + self.count
        if length > self.engine.config.max_sequence_length:
            return []  # positions that the draft does not have
        decoding = self._drafts.get(request)
        if decoding is None:
            room = request.room + self.count
            # On a GPU each cache would have CUDA graphs of its own.
            decoding = self.engine.decoding(len(request.prompt.layout) + room, triton=False)
            decoding.add([request.prompt], [room], [1])
            self._drafts[request] = decoding
        fed = decoding.rows[0].written
        with self.engine.one_thread():
            decoding.append(torch.tensor([request.tokens[fed:]], device=self.engine.device))
            proposed: list[int] = []
            while True:
                proposed.append(int(decoding.logits[0].argmax()))
                if len(proposed) == self.count:
                    break
                decoding.append(torch.tensor([proposed[-1]], device=self.engine.device))
        decoding.shorten(0, len(proposed) - 1)  # what comes of them is not known yet
        return proposed

    def forget(self, request: Request) -> None:
        """Its draft's memory is free."""
        self._drafts.pop(request, None)


def check_draft(engine: Engine, draft: Engine) -> None:
    """Raises ``InputError`` if one model's tokens are not the other's."""
    if (engine.config.vocab_size, engine.config.special_tokens) != (draft.config.vocab_size, draft.config.special_tokens):
        raise InputError(
            f"the draft has a vocabulary of {draft.config.vocab_size}, the model of {engine.config.vocab_size}",
            hint="take a smaller model of the same family",
            key="draft",
        )
