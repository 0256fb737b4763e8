"""Configurations as YAML and as plain dicts; reading is bounded and creates plain values only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, PlainSerializer, ValidationError, ValidationInfo

from advmoe import migrations
from advmoe.config.schema import RunConfig, RuntimeConfig
from advmoe.errors import UserError, one_line, short_name, short_repr
from advmoe.files import JsonObject, bounded_text

CONFIG_FILE = "config.yaml"  # in the folder of a run
SCHEMA = 2  # 1 said "picture" where 2 says "image"
MAX_BYTES = 2**18  # of a YAML file: ours have a few thousand
# 'section.field' of the settings that are no part of a run's result: where it runs, where its data lies, what it does on a NaN
OF_MACHINE = frozenset(
    [*(f"runtime.{name}" for name in RuntimeConfig.model_fields if name != "precision"), "data.data_dir", "data.workers",
     "training.on_nonfinite"]
)  # fmt: skip


def to_dict(config: RunConfig) -> JsonObject:
    """The configuration as nested dicts of plain values, as YAML files and Records hold it."""
    return {"schema": SCHEMA, **config.model_dump()}


def from_dict(tree: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """The inverse of `to_dict`; missing fields take their defaults.

    Raises UserError that begins with `where` for unknown fields (with the nearest names) and for values that are not allowed.
    """
    fields = dict(tree)
    schema = fields.pop("schema", 1)
    if schema not in (1, SCHEMA):
        raise UserError(f"{where}: schema {short_repr(schema)} is not supported by this version (1 to {SCHEMA})")
    if schema == 1:
        fields = migrations.renamed(fields)
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, RunConfig)}") from None


def _restored(tree: Any, info: ValidationInfo) -> RunConfig:
    if isinstance(tree, RunConfig):
        return tree
    if not isinstance(tree, Mapping):
        raise ValueError(f"must be a mapping of fields, not {short_repr(tree)}")
    return from_dict(tree, (info.context or {}).get("where", "configuration"))


# A field of a model that is kept in a file: written by `to_dict` and read by `from_dict`, whose errors begin with the context's
# `where`.
StoredConfig = Annotated[RunConfig, BeforeValidator(_restored), PlainSerializer(to_dict)]


def load_yaml(path: Path) -> RunConfig:
    """The configuration in a YAML file. Raises UserError if it cannot be read."""
    return from_dict(read_mapping(path), str(path))


def load_run_config(path: Path) -> RunConfig:
    """The configuration in the folder of a run, which may be of an older version. Raises UserError if it cannot be read."""
    return from_dict(migrations.config(read_mapping(path)), str(path))


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_mapping(path: Path) -> dict[Any, Any]:
    """A YAML file that holds a mapping. Raises UserError if it holds something else or cannot be read."""
    try:
        text = bounded_text(path, MAX_BYTES)
        tree = yaml.load(text, _Loader)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a value that does not fit its tag raises nearly any exception
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no mapping of fields")
    return tree


class _Loader(yaml.SafeLoader):
    """Reads plain values only. It refuses merged mappings (<<), because a few lines of them can fill gigabytes, and a field that is
    given twice, because yaml would keep only the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave << as it is: a tag for which there is no constructor. Raises ValueError if a field is given twice."""
        names: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in names:
                raise ValueError(f"{short_name(key.value)} is given twice, the second time in line {key.start_mark.line + 1}")
            names.add((key.tag, key.value))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """'section.field: x, not y' for every field in which two runs differ, apart from those of `OF_MACHINE`."""
    one, other = flat_settings(a.model_dump()), flat_settings(b.model_dump())
    return [f"{name}: {value}, not {other[name]}" for name, value in one.items() if value != other[name] and name not in OF_MACHINE]


def flat_settings(tree: JsonObject) -> JsonObject:
    """'section.field' -> value, of a configuration as nested dicts; fields outside sections have their name only."""
    flat: JsonObject = {}
    for name, value in tree.items():
        flat |= {f"{name}.{field}": entry for field, entry in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
