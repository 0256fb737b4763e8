"""Convert files of older versions of this package to the present form.

A run of each version is kept in tests/fixtures/versions and must load forever. This is the only module that knows old names.

- Manifests without a seal; then histories that name no phase, networks whose experts shared their batch norms without a field
  that says so, and tensors under other names (configurations and manifests of schema 1, Records of schema 1).
- Names with "picture" where the code now says "image" (configurations and manifests of schema 1, Records of schemas 1 and 2).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from advmoe.files import JsonObject

Value = TypeVar("Value")

UNSEALED = frozenset(("schema", "epoch", "fingerprint", "sha256", "history"))
OLD_RESNET = {"stem.1.weight", "blocks.0.norm1.weight"}  # the only network of that time; a WRN has such blocks, not such a stem
NAMES = (
    (re.compile(r"^stem\.1\."), "stem.0.norm."),
    (re.compile(r"^(blocks\.\d+)\.norm([12])\."), r"\1.conv\2.norm."),
    (re.compile(r"^(blocks\.\d+)\.shortcut\.0\."), r"\1.shortcut."),
    (re.compile(r"^(blocks\.\d+)\.shortcut\.1\."), r"\1.shortcut.norm."),
)


RENAMED = {
    "picture": "image",
    "pictures": "images",
    "picture_size": "image_size",
    "train_pictures": "train_images",
    "test_pictures": "test_images",
    "router_pictures": "router_images",
    "pictures_per_second": "images_per_second",
}


def renamed(tree: Any) -> Any:
    """A tree of dicts and lists with today's field names for old ones, at any depth. Text in values is left alone.

    A part that a YAML file refers to several times, or that contains itself, is renamed once.
    """
    return _renamed(tree, {})


def _renamed(tree: Any, done: dict[int, Any]) -> Any:
    if id(tree) in done:
        return done[id(tree)]
    if isinstance(tree, Mapping):
        fields = done[id(tree)] = {}
        fields.update({RENAMED.get(name, name): _renamed(value, done) for name, value in tree.items()})
        return fields
    if isinstance(tree, list):
        values = done[id(tree)] = []
        values.extend([_renamed(value, done) for value in tree])
        return values
    return tree


NOT_FIGURES = frozenset(
    ("images", "complete", "intervals", "attacks", "left_out", "routing", "checks", "flags", "broken", "partly_run")
)


def record(content: Mapping[str, Any], schema: int) -> JsonObject:
    """The content of a Record in the form of `schema`, which is today's."""
    old_schema = content["schema"]
    if old_schema == schema:
        return dict(content)
    new: JsonObject = {**renamed(content), "schema": schema, "from_schema": old_schema}
    if isinstance(new.get("evaluation"), Mapping):
        new["evaluation"] = _evaluation(new["evaluation"])
    if isinstance(new.get("config"), Mapping):
        new["config"] = config(new["config"])
    return new


def _evaluation(old: Mapping[str, Any]) -> JsonObject:
    """An evaluation whose figures stood beside its other fields, some of which could be null."""
    known = {name: value for name, value in old.items() if name in NOT_FIGURES}
    empty: JsonObject = {name: {} for name in ("attacks", "left_out") if known.get(name, "") is None}
    return {**known, **empty, "figures": {name: value for name, value in old.items() if name not in NOT_FIGURES}}


def is_unsealed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is older than seals: it has exactly the fields of that time. A flipped bit cannot give a sealed one these
    fields."""
    return manifest.keys() == UNSEALED


def history(rows: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
    """The rows of a history; rows without a phase belong to phase 1."""
    return [{**row, "phase": row.get("phase", 1)} for row in rows]


def tensors(state: Mapping[str, Value], schema: int) -> dict[str, Value]:
    """A network's state, from a checkpoint of `schema`, by the present names."""
    old = schema == 1 and state.keys() >= OLD_RESNET
    return {_name(name): value for name, value in state.items()} if old else dict(state)


def config(tree: Mapping[str, Any]) -> JsonObject:
    """The tree of a configuration that a run or a Record stored, with all fields of its version."""
    model = tree.get("model")
    if isinstance(model, Mapping) and "bank" in model and "norms" not in model:
        return {**tree, "model": {**model, "norms": "shared"}}
    return dict(tree)


def _name(name: str) -> str:
    for pattern, present in NAMES:
        name = pattern.sub(present, name)
    return name
