"""What a user got wrong, in one line."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake in what the user gave: says what, where, and what would be right. The command line exits with 2.

    Letters that a terminal would obey, or that cannot be written, are shown by their numbers: names come from files, too.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line))


def nearest(name: str, names: list[str]) -> str:
    """'did you mean a, b?' for the names close to `name`, else the list of all names."""
    close = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(sorted(names))}"


def lookup(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """`table[name]`, or a UserError that names the nearest entries."""
    if name not in table:
        raise UserError(f"unknown {what} '{name}': {nearest(name, list(table))}")
    return table[name]
