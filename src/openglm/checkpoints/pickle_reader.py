"""A pickle, read as data: an interpreter of an allow-list of opcodes that executes nothing.

Python's own unpickler calls whatever a file names. This one knows plain values, dictionaries, lists and tuples, and
hands three kinds of things to its caller: a global (only ever a name, ``Named``), a call of a global (``reduce``),
and a persistent id (``persistent``). Whatever the caller does not know stays an inert ``Placeholder``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from openglm.errors import OpenGLMError


class MalformedPickle(ValueError):
    """What is wrong with the pickle; the reader of the file turns it into a ``CheckpointError``."""


class Named:
    """A global that a pickle names, as text: nothing is imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Placeholder:
    """Stands for an object that is not built; ``what`` says what the file wanted."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


_MARK = object()
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False}
#: Opcode to (format of the length, what to make of that many bytes).
_RUNS: dict[int, tuple[str, str]] = {
    ord("X"): ("<I", "text"),
    0x8C: ("<B", "text"),
    0x8D: ("<Q", "text"),
    ord("B"): ("<I", "bytes"),
    ord("C"): ("<B", "bytes"),
    0x8E: ("<Q", "bytes"),
    ord("T"): ("<I", "bytes"),  # a byte string of Python 2
    ord("U"): ("<B", "bytes"),
    0x8A: ("<B", "int"),
    0x8B: ("<I", "int"),
}
_NUMBERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
_PUT = {ord("q"): "<B", ord("r"): "<I"}
_GET = {ord("h"): "<B", ord("j"): "<I"}
_SHORT_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def read_pickle(data: bytes, *, reduce: Callable[[str, tuple[Any, ...]], Any], persistent: Callable[[Any], Any]) -> Any:
    """The object that a pickle of protocol 2 to 5 describes.

    ``reduce(name, arguments)`` is asked for every call of a global, ``persistent(id)`` for every persistent id; both
    return a value or a ``Placeholder``. Raises ``MalformedPickle`` for anything else than a well-formed pickle within
    the allow-list. Depth costs no recursion, and no operand is longer than the data.
    """
    try:
        return _Machine(data, reduce, persistent).run()
    except (MalformedPickle, OpenGLMError):
        raise
    except (LookupError, ValueError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise MalformedPickle("the pickle is damaged") from error


class _Machine:
    def __init__(self, data: bytes, reduce: Callable[[str, tuple[Any, ...]], Any], persistent: Callable[[Any], Any]) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.reduce = reduce
        self.persistent = persistent

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise MalformedPickle("the pickle ends in the middle")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedPickle("the pickle is damaged")
        return value

    def to_mark(self) -> list[Any]:
        """What lies above the topmost mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise MalformedPickle("the pickle is damaged")

    def run(self) -> Any:
        push = self.stack.append
        while True:
            op = self.take(1)[0]
            if op == ord("."):
                return self.pop()
            if op in _PUT:
                self.memo[self.number(_PUT[op])] = self.stack[-1]
            elif op in _GET:
                push(self.memo[self.number(_GET[op])])
            elif op in _NUMBERS:
                push(self.number(_NUMBERS[op]))
            elif op in _RUNS:
                form, kind = _RUNS[op]
                run = self.take(self.number(form))
                push(run.decode("utf-8", "surrogatepass") if kind == "text" else run if kind == "bytes" else _long(run))
            elif op in _CONSTANTS:
                push(_CONSTANTS[op])
            elif op in _SHORT_TUPLES:
                values = [self.pop() for _ in range(_SHORT_TUPLES[op])]
                push(tuple(reversed(values)))
            elif not self.structure(op):
                raise MalformedPickle(f"the pickle holds the instruction 0x{op:02X}, which no tensor file needs")

    def structure(self, op: int) -> bool:
        """Containers, marks, globals and calls. False for an opcode outside the allow-list."""
        stack, push = self.stack, self.stack.append
        match op:
            case 0x28:  # MARK
                push(_MARK)
            case 0x7D:  # EMPTY_DICT
                push({})
            case 0x5D:  # EMPTY_LIST
                push([])
            case 0x29:  # EMPTY_TUPLE
                push(())
            case 0x8F:  # EMPTY_SET
                push(Placeholder("set"))
            case 0x74:  # TUPLE
                push(tuple(self.to_mark()))
            case 0x91:  # FROZENSET
                self.to_mark()
                push(Placeholder("frozenset"))
            case 0x90:  # ADDITEMS
                self.to_mark()
            case 0x61:  # APPEND
                self.extend([self.pop()])
            case 0x65:  # APPENDS
                self.extend(self.to_mark())
            case 0x73:  # SETITEM
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case 0x75:  # SETITEMS
                self.set_items(self.to_mark())
            case 0x94:  # MEMOIZE
                self.memo[len(self.memo)] = stack[-1]
            case 0x63:  # GLOBAL
                push(Named(f"{self.line()}.{self.line()}"))
            case 0x93:  # STACK_GLOBAL
                name, module = self.pop(), self.pop()
                push(Named(f"{module:s}.{name:s}"))
            case 0x52 | 0x81:  # REDUCE, NEWOBJ
                arguments, function = self.pop(), self.pop()
                push(self.call(function, arguments))
            case 0x92:  # NEWOBJ_EX
                _, arguments, function = self.pop(), self.pop(), self.pop()
                push(self.call(function, arguments))
            case 0x62:  # BUILD: attributes of an object (of an OrderedDict: `_metadata`); nothing here needs them
                self.pop()
            case 0x51:  # BINPERSID
                push(self.persistent(self.pop()))
            case 0x80:  # PROTO
                if self.take(1)[0] > 5:
                    raise MalformedPickle("the pickle is of an unknown protocol")
            case 0x95:  # FRAME: a hint for readers of streams
                self.take(8)
            case 0x30:  # POP
                stack.pop()
            case 0x31:  # POP_MARK
                self.to_mark()
            case 0x32:  # DUP
                push(stack[-1])
            case _:
                return False
        return True

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise MalformedPickle("the pickle is damaged")
        if isinstance(function, Named):
            return self.reduce(function.name, arguments)
        return Placeholder(function.what if isinstance(function, Placeholder) else "unknown")

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Placeholder):
            raise MalformedPickle("the pickle is damaged")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if len(values) % 2 or not isinstance(target, dict | Placeholder):
            raise MalformedPickle("the pickle is damaged")
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                # The hash of a deeply nested tuple would overflow the stack, so only plain keys are taken as they are.
                target[key if isinstance(key, _PLAIN_KEYS) else Placeholder("key")] = value


def _long(run: bytes) -> int:
    return int.from_bytes(run, "little", signed=True)
