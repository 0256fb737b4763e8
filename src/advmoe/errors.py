"""What a user got wrong, in one line."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake in what the user gave: says what, where, and what would be right. The command line exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def nearest(name: str, names: list[str]) -> str:
    """'did you mean a, b?' for the names close to `name`, else the list of all names."""
    close = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(sorted(names))}"


def lookup(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """`table[name]`, or a UserError that names the nearest entries."""
    if name not in table:
        raise UserError(f"unknown {what} '{name}': {nearest(name, list(table))}")
    return table[name]
