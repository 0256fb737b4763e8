"""Trees of dicts and lists, as JSON files hold them: the paths in one, and a copy with another value at a path."""

import copy
from collections.abc import Iterator
from typing import Any

REMOVED = object()
JsonPath = tuple[Any, ...]


def json_paths(tree: Any, parent: JsonPath = ()) -> Iterator[JsonPath]:
    """The path of every value in a tree; of a list, only its first entry."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*parent, key)
        yield from json_paths(value, (*parent, key))


def with_value(tree: Any, path: JsonPath, value: Any) -> Any:
    """A copy with `value` at `path`, or without that entry (REMOVED). KeyError, IndexError or TypeError if it does not exist."""
    changed = copy.deepcopy(tree)
    node = changed
    for key in path[:-1]:
        node = node[key]
    if value is REMOVED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return changed
