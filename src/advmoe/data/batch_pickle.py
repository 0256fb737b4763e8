"""Reads a CIFAR batch (a pickle) as data, without Python's unpickler: nothing in the file is imported or called.

A pickle is a program. The reader follows the operations that Python 2 and 3 write for dicts, lists, numbers, strings and numpy
arrays, and refuses all others. The result is never larger than the file.
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
PYTHON_2_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING")
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
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "MARK": lambda: MARK,
}  # fmt: skip
IGNORED = frozenset(("PROTO", "FRAME", "STOP"))


class Function(Enum):
    """The functions and classes that a batch may name."""

    RECONSTRUCT = auto()
    FROM_BUFFER = auto()
    SCALAR = auto()
    NDARRAY = auto()
    DTYPE = auto()
    ENCODE = auto()


FUNCTIONS = {
    f"{module} {name}": function
    for function, modules, name in (
        (Function.RECONSTRUCT, ("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct"),
        (Function.FROM_BUFFER, ("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer"),
        (Function.SCALAR, ("numpy.core.multiarray", "numpy._core.multiarray"), "scalar"),
        (Function.NDARRAY, ("numpy",), "ndarray"),
        (Function.DTYPE, ("numpy",), "dtype"),
        (Function.ENCODE, ("_codecs",), "encode"),
    )
    for module in modules
}


@dataclass(eq=False)
class Call:
    """A call that the pickle asks for. It is never executed: `to_array` computes its result from the arguments."""

    function: Any
    arguments: Any
    state: Any = None


def read_pickle(content: bytes) -> Any:
    """The dicts, lists, tuples, numbers and strings of a pickle, with a `Call` in place of every numpy array and number.

    Raises UnpicklingError if the pickle asks for anything else, and nearly any exception on damage.
    """
    reader = _Reader(len(content))
    for operation, argument, _ in pickletools.genops(content):
        reader.follow(operation.name, argument)
    (result,) = reader.stack
    return result


def to_array(value: Any) -> np.ndarray:
    """The numpy array of integers that a `Call`, or a list or tuple of integers, stands for.

    Raises TypeError, in words for the user, for any other value or numbers that are not integers.
    """
    if isinstance(value, list | tuple):
        return np.array([_integer(item) for item in value], dtype=np.int64)
    if not isinstance(value, Call):
        raise TypeError(f"an array or a list is needed, not {type(value).__name__}")
    if value.function is Function.RECONSTRUCT:
        _, shape, dtype, fortran_order, content = value.state
    elif value.function is Function.FROM_BUFFER:
        content, dtype, shape, order = value.arguments
        fortran_order = order == "F"
    else:
        raise TypeError("an array or a list is needed, not a single number")
    return np.frombuffer(content, _integer_dtype(dtype)).reshape(shape, order="F" if fortran_order else "C").copy()


def _integer(item: Any) -> int:
    if isinstance(item, Call) and item.function is Function.SCALAR:
        dtype, content = item.arguments
        (number,) = np.frombuffer(content, _integer_dtype(dtype)).tolist()
        item = number
    if type(item) is not int:
        raise TypeError(f"whole numbers are needed, not {type(item).__name__}")
    return item


def _integer_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype that a pickled one stands for: its name, such as 'u1', and its state, which begins with the byte order."""
    if not isinstance(dtype, Call) or dtype.function is not Function.DTYPE:
        raise TypeError("an array of unknown numbers")
    name = dtype.arguments[0].decode() if isinstance(dtype.arguments[0], bytes) else dtype.arguments[0]
    if name not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
        raise TypeError(f"whole numbers are needed, not numbers of type {str(name)[:20]}")
    byte_order = dtype.state[1].decode() if isinstance(dtype.state[1], bytes) else dtype.state[1]
    return np.dtype(f"{'>' if byte_order == '>' else '<'}{name}")


class _Reader:
    """The machine that a pickle is a program for: a stack, and a memo of numbered values."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.remaining = size  # bytes that may still be encoded: as many as the file has

    def follow(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in PYTHON_2_STRINGS:
            self.stack.append(argument.encode("latin1"))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in STEPS:
            STEPS[name](self, argument)
        elif name not in IGNORED:
            raise UnpicklingError(f"it contains the operation {name}")

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def pop(self, count: int) -> list[Any]:
        """Remove the `count` uppermost values from the stack and return them."""
        if len(self.stack) < count:
            raise UnpicklingError("its stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def pop_to_mark(self) -> list[Any]:
        """Remove the values above the last mark, and the mark, from the stack and return the values."""
        count = next((above for above, item in enumerate(reversed(self.stack)) if item is MARK), len(self.stack))
        items = self.pop(count)
        self.pop(1)
        return items

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise UnpicklingError("it appends to a value that is not a list")
        self.stack[-1].extend(items)

    def fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(name, str | bytes) for name in items[::2]):
            raise UnpicklingError("it sets items of a value that is not a dict, or by a key that is not a string")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def push_function(self, name: str) -> None:
        if name not in FUNCTIONS:
            raise UnpicklingError(f"it asks for {name.replace(' ', '.')}")
        self.stack.append(FUNCTIONS[name])

    def reduce(self) -> None:
        """A call. Encoding a string is done here; a call that makes an array or a number is kept."""
        function, arguments = self.pop(2)
        if function is not Function.ENCODE:
            return self.stack.append(Call(function, arguments))
        text, encoding = arguments
        self.remaining -= len(text)
        if encoding != "latin1" or self.remaining < 0:
            raise UnpicklingError("it encodes more than it contains, or not in latin1")
        return self.stack.append(text.encode("latin1"))

    def build(self) -> None:
        state = self.pop(1)[0]
        if not isinstance(self.stack[-1], Call):
            raise UnpicklingError("it sets the state of a value that has none")
        self.stack[-1].state = state


def _filled(reader: _Reader, empty: Any, fill: Callable[[_Reader, list[Any]], None]) -> None:
    items = reader.pop_to_mark()
    reader.push(empty)
    fill(reader, items)


def _tuple(count: int, reader: _Reader, _: Any) -> None:
    reader.push(tuple(reader.pop(count)))


STEPS: Mapping[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "APPEND": lambda reader, _: reader.extend(reader.pop(1)), "APPENDS": lambda reader, _: reader.extend(reader.pop_to_mark()),
    "SETITEM": lambda reader, _: reader.fill(reader.pop(2)), "SETITEMS": lambda reader, _: reader.fill(reader.pop_to_mark()),
    "DICT": lambda reader, _: _filled(reader, {}, _Reader.fill), "LIST": lambda reader, _: _filled(reader, [], _Reader.extend),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_to_mark())),
    **{f"TUPLE{count}": partial(_tuple, count) for count in (1, 2, 3)},
    "GLOBAL": lambda reader, name: reader.push_function(name),
    "STACK_GLOBAL": lambda reader, _: reader.push_function(" ".join(reader.pop(2))),
    "REDUCE": lambda reader, _: reader.reduce(), "BUILD": lambda reader, _: reader.build(),
}  # fmt: skip
