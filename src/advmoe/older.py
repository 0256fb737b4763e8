"""What older versions of this package wrote otherwise, brought to the present form.

A run of each is kept in tests/fixtures/versions and must load for ever. All of these had schema 1: manifests without a seal; then,
before methods had phases, histories that name none, networks whose experts shared their batch norms, which no field told, and
tensors by other names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")

UNSEALED = frozenset(("schema", "epoch", "fingerprint", "sha256", "history"))
OLD_RESNET = {"stem.1.weight", "blocks.0.norm1.weight"}  # the only network of that time; a WRN has such blocks, not such a stem
NAMES = (
    (re.compile(r"^stem\.1\."), "stem.0.norm."),
    (re.compile(r"^(blocks\.\d+)\.norm([12])\."), r"\1.conv\2.norm."),
    (re.compile(r"^(blocks\.\d+)\.shortcut\.0\."), r"\1.shortcut."),
    (re.compile(r"^(blocks\.\d+)\.shortcut\.1\."), r"\1.shortcut.norm."),
)


def is_unsealed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is from before there were seals: it has that time's fields and no other, to which no flipped bit brings a
    sealed one."""
    return manifest.keys() == UNSEALED


def history(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a history; those that name no phase were all of one."""
    return [{**row, "phase": row.get("phase", 1)} for row in rows]


def tensors(state: Mapping[str, Value]) -> dict[str, Value]:
    """A network's state by the present names."""
    return {_name(name): value for name, value in state.items()} if state.keys() >= OLD_RESNET else dict(state)


def config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a configuration that was written with all fields of its time (a run's, or a Record's), not by hand."""
    model = tree.get("model")
    if isinstance(model, Mapping) and "bank" in model and "norms" not in model:
        return {**tree, "model": {**model, "norms": "shared"}}
    return dict(tree)


def _name(name: str) -> str:
    for pattern, present in NAMES:
        name = pattern.sub(present, name)
    return name
