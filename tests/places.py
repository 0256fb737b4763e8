"""Values at places in a tree of dicts and lists, as a JSON file holds it."""

import copy
from collections.abc import Iterator
from typing import Any

LEFT_OUT = object()
Place = tuple[Any, ...]


def places(tree: Any, above: Place = ()) -> Iterator[Place]:
    """Paths to everything in a tree; of a list its first entry."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(tree: Any, place: Place, value: Any) -> Any:
    """A copy with `value` at `place` (LEFT_OUT: without it). Raises KeyError, IndexError or TypeError if it does not exist."""
    made = copy.deepcopy(tree)
    own = made
    for key in place[:-1]:
        own = own[key]
    if value is LEFT_OUT:
        del own[place[-1]]
    else:
        own[place[-1]] = value
    return made
