"""Mistakes of a user, each reported in one line."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

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
