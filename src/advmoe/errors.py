"""Mistakes of a user, each reported in one line."""

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, SupportsIndex, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import JsonSchemaValue

INTEGER_LIMIT = 2**64  # whole numbers in files are smaller
TYPE_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "none", "array": "list"}

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake in what the user gave: the message says what, where, and what would be right. The command line exits with status 2.

    The message is one line, in characters that can be printed (see `printable`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


def printable(text: str) -> str:
    r"""The text with control characters and bytes that are not UTF-8 written as escapes (\x1b, \udcff).

    A file name may contain any of them: they would drive a terminal, or could not be encoded.
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def nearest(name: str, names: list[str]) -> str:
    """'did you mean a or b?' if there are names close to `name`, else the list of all names."""
    close = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(sorted(names))}"


def lookup(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """`table[name]`, or a UserError that names similar entries."""
    if name not in table:
        raise UserError(f"unknown {what} '{name}': {nearest(name, list(table))}")
    return table[name]


def check_count(name: str, value: int) -> None:
    """Raises UserError if a number of things is not a whole number in [1, 2**31): larger ones overflow in Python and torch."""
    if not isinstance(value, SupportsIndex):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if not 1 <= value < 2**31:
        raise UserError(f"{name} must be {'at least 1' if value < 1 else 'less than 2**31'}, not {value}")


def reason_of(error: object, named: bool = False) -> str:
    """An error's message in one line of at most 200 letters, or the name of its class if it has none.

    With `named` the name of the class comes first: 'KeyError: 3'.
    """
    text = f"{type(error).__name__}: {error}" if named else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def short_repr(value: Any) -> str:
    """A value from a file in at most 80 letters."""
    try:
        text = reprlib.repr(value)  # not repr: a few lines of YAML aliases can mean gigabytes
    except ValueError:  # Python's limit on the digits that it writes
        text = "a number of thousands of digits"
    return truncated(text)


def short_name(name: Any, prefix: str = "") -> str:
    """A field's name from a file in at most 80 letters."""
    return truncated(prefix + (name if isinstance(name, str) else short_repr(name)))


def truncated(text: str) -> str:
    """Text in at most 80 letters."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first unknown field, else the first wrong value, of data that `model` refused: 'model.num_experts must be ..., not 0'."""
    details = error.errors(include_url=False)
    unknown = [detail for detail in details if detail["type"] in ("extra_forbidden", "invalid_key")]
    detail: Any = (unknown or details)[0]
    schema, location = model.model_json_schema(), [str(part) for part in detail["loc"]]
    name = truncated(".".join(location))
    if unknown:
        parent = _field(schema, location[:-1])
        return f"unknown field {name!r}: {nearest(truncated(location[-1]), list(parent.get('properties', ())))}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    part = _field(schema, location)
    if detail["type"] == "value_error" or not part:
        reason = reason_of(detail.get("ctx", {}).get("error", detail["msg"]))
        separator = "" if not name else " " if reason.startswith("must") else ": "
        return f"{name}{separator}{reason}"
    return f"{name} must be {_allowed(part, detail['type'])}, not {short_repr(detail['input'])}"


def _field(schema: JsonSchemaValue, location: list[str]) -> JsonSchemaValue:
    """The part of a JSON Schema that describes the field at `location`."""
    part = schema
    for name in location:
        part = part.get("properties", {}).get(name, {})
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return part


def _allowed(part: JsonSchemaValue, error_type: str) -> str:
    """What a field takes, in words; `error_type` is the error's."""
    options = part.get("anyOf", [part])
    if error_type.startswith(("greater_than", "less_than", "finite")):
        return _range(options[0], error_type)
    if "enum" in part:
        return f"one of {', '.join(part['enum'])}"
    return " or ".join(TYPE_NAMES.get(option.get("type", "object"), "a mapping of fields") for option in options)


def _range(part: JsonSchemaValue, error_type: str) -> str:
    """'in (0, 1]', 'at least 1', 'positive and finite'."""
    low, above, high, below = (part.get(name) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    if below == INTEGER_LIMIT:
        if error_type == "less_than":
            return "less than 2**64"
        below = None
    if high is None and below is None:
        bound = f"at least {low}" if above is None else "positive" if above == 0 else f"more than {above}"
        return f"{bound} and finite" if part.get("type") == "number" else bound
    bracket = f"[{low}" if above is None else f"({above}"
    return f"in {bracket}, {high}]" if below is None else f"in {bracket}, {'2**63' if below == 2**63 else below})"
