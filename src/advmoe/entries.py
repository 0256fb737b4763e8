"""The tables of named entries that users extend (METHODS, ATTACKS, ...), and the checks of what users add."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from advmoe.errors import UserError

Entry = TypeVar("Entry")


class Entries(dict[str, Entry]):
    """Entries by name. Users add entries with new names; `replaced` lists the names of the package that now have another entry."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self._package = dict(entries)

    @property
    def replaced(self) -> list[str]:
        """Names of the package whose entry is not the package's."""
        return [name for name, entry in self._package.items() if self.get(name) is not entry]


def check_kind(what: str, value: object, kind: type) -> None:
    """Raises UserError, which starts with `what`, if `value` is not of the class `kind`."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise UserError(f"{what} must be {article} {kind.__name__}, not {_in_words(value)}")


def check_accepts(what: str, function: Any, *names: str) -> None:
    """Raises UserError, which starts with `what`, if `function` cannot be called with positional arguments of these `names`."""
    arguments = f"({', '.join(names)})"
    if not callable(function):
        raise UserError(f"{what} must be a function of {arguments}, not {_in_words(function)}")
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise UserError(f"{what} must accept {arguments}: {error}") from None
    except ValueError:  # a function of C, which has no signature
        return


def _in_words(value: object) -> str:
    """'a function', 'the class Tower', 'a Tensor', 'None'."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
