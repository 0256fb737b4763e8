"""A CIFAR batch's pickle read as data: its operations are followed here, Python's own unpickler runs none of them.

A pickle is a program. Of its operations those are known that Python 2 and 3 write for dicts, lists, numbers, texts and numpy
arrays; nothing is imported, looked up or called, and what is made is no more than the file holds.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pickle import UnpicklingError
from typing import Any

import numpy as np

MARK = object()
BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # texts of Python 2
VALUES = frozenset(  # operations whose argument is the value
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)
PLAIN: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "MARK": lambda: MARK,
}  # fmt: skip
IDLE = frozenset(("PROTO", "FRAME", "STOP"))


class Known(Enum):
    """What a batch may ask for by name."""

    RECONSTRUCT = auto()
    NDARRAY = auto()
    DTYPE = auto()
    ENCODE = auto()


NAMES = {
    "numpy.core.multiarray _reconstruct": Known.RECONSTRUCT, "numpy._core.multiarray _reconstruct": Known.RECONSTRUCT,
    "numpy ndarray": Known.NDARRAY, "numpy dtype": Known.DTYPE, "_codecs encode": Known.ENCODE,
}  # fmt: skip


@dataclass(eq=False)
class Made:
    """What `by` was to make of `arguments` and to give `state`: nothing is made of it before `uint8_array`."""

    by: Any
    arguments: Any
    state: Any = None


def unpickled(content: bytes) -> Any:
    """The dicts, lists, tuples, numbers and texts that a pickle stands for, with a Made for every array.

    Raises UnpicklingError where it asks for anything else, and nearly anything on damage.
    """
    reader = _Reader(len(content))
    for operation, argument, _ in pickletools.genops(content):
        reader.follow(operation.name, argument)
    (found,) = reader.stack
    return found


def uint8_array(made: Any) -> np.ndarray:
    """The array that `unpickled` left as a Made. Raises TypeError where it is of other numbers, or none."""
    if not isinstance(made, Made) or made.by is not Known.RECONSTRUCT:
        raise TypeError(f"data of type {type(made).__name__}, not an array")
    _, shape, kind, by_columns, content = made.state
    if kind.by is not Known.DTYPE or kind.arguments[0] not in ("u1", b"u1"):
        raise TypeError(f"data of type {str(kind.arguments[0])[:20]}, not u1")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C").copy()


class _Reader:
    """The machine that a pickle is a program of: a stack, and numbered things to come back to."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.room = size  # bytes that may be encoded: what stands in the file, once

    def follow(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in BYTES:
            self.stack.append(argument.encode("latin1"))
        elif name in PLAIN:
            self.stack.append(PLAIN[name]())
        elif name in STEPS:
            STEPS[name](self, argument)
        elif name not in IDLE:
            raise UnpicklingError(f"it holds the operation {name}")

    def put(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def popped(self, count: int) -> list[Any]:
        """The `count` uppermost things, which go."""
        if len(self.stack) < count:
            raise UnpicklingError("its stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def marked(self) -> list[Any]:
        """What lies above the last mark; both go."""
        count = next((above for above, item in enumerate(reversed(self.stack)) if item is MARK), len(self.stack))
        items = self.popped(count)
        self.popped(1)
        return items

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise UnpicklingError("it appends to what is no list")
        self.stack[-1].extend(items)

    def fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(name, str | bytes) for name in items[::2]):
            raise UnpicklingError("it sets items of what is no dict, or by what is no name")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def named(self, name: str) -> None:
        if name not in NAMES:
            raise UnpicklingError(f"it asks for {name.replace(' ', '.')}")
        self.stack.append(NAMES[name])

    def reduce(self) -> None:
        """A call: of a text to be encoded, or of what makes an array."""
        by, arguments = self.popped(2)
        if by is not Known.ENCODE:
            return self.stack.append(Made(by, arguments))
        text, encoding = arguments
        self.room -= len(text)
        if encoding != "latin1" or self.room < 0:
            raise UnpicklingError("it encodes more than it holds, or not in latin1")
        return self.stack.append(text.encode("latin1"))

    def build(self) -> None:
        state = self.popped(1)[0]
        if not isinstance(self.stack[-1], Made):
            raise UnpicklingError("it gives a state to what has none")
        self.stack[-1].state = state


def _filled(reader: _Reader, empty: Any, fill: Callable[[_Reader, list[Any]], None]) -> None:
    items = reader.marked()
    reader.push(empty)
    fill(reader, items)


def _tuple(count: int, reader: _Reader, _: Any) -> None:
    reader.push(tuple(reader.popped(count)))


STEPS: Mapping[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "APPEND": lambda reader, _: reader.extend(reader.popped(1)), "APPENDS": lambda reader, _: reader.extend(reader.marked()),
    "SETITEM": lambda reader, _: reader.fill(reader.popped(2)), "SETITEMS": lambda reader, _: reader.fill(reader.marked()),
    "DICT": lambda reader, _: _filled(reader, {}, _Reader.fill), "LIST": lambda reader, _: _filled(reader, [], _Reader.extend),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.marked())),
    **{f"TUPLE{count}": partial(_tuple, count) for count in (1, 2, 3)},
    "GLOBAL": lambda reader, name: reader.named(name), "STACK_GLOBAL": lambda reader, _: reader.named(" ".join(reader.popped(2))),
    "REDUCE": lambda reader, _: reader.reduce(), "BUILD": lambda reader, _: reader.build(),
}  # fmt: skip
