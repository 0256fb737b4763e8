"""A sweep's folder: one folder for each run, and the plan in DIR/sweep.yaml."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from advmoe import migrations
from advmoe.config import RunConfig, read_mapping, to_dict
from advmoe.errors import UserError, short_repr
from advmoe.files import JsonObject, write_atomically
from advmoe.sweep.plan import Planned

PLAN = "sweep.yaml"
PROBE = ".probe.json"
LOCK = ".lock"  # locked while a process adds to the plan or claims the folder of a run; other sweeps may use the same folder
SCHEMA = 2  # in schema 1 the fields "image..." were called "picture..."


class StoredRun(BaseModel):
    """A run in a plan. `config` has the fields that differ from the defaults, in the form of the version that planned the run.
    `advmoe.config.from_dict` reads it."""

    model_config = ConfigDict(frozen=True, strict=True)

    preset: list[str]
    config: JsonObject


class Plan(BaseModel):
    """The content of DIR/sweep.yaml: all runs that were ever planned in the folder, by name, and the argument of the last sweep."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_number: int = Field(SCHEMA, alias="schema")
    sweep: str = ""
    runs: dict[str, StoredRun] = Field(default_factory=dict)


def read_plan(path: Path) -> Plan:
    """The plan in a file of this or an older schema; an empty plan if there is no file. Raises UserError if it cannot be read."""
    if not path.exists():
        return Plan(schema=SCHEMA)
    tree = read_mapping(path)
    schema = tree.get("schema")
    if schema not in (1, SCHEMA):
        raise UserError(f"{path}: schema {short_repr(schema)} is not supported by this version (1 to {SCHEMA}); move the file away")
    try:
        return Plan.model_validate(migrations.sweep_plan(tree) if schema == 1 else tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = short_repr(".".join(str(part) for part in first["loc"]))
        raise UserError(f"{path}: {field}: {first['msg']}; move the file away") from None


def write_plan(out: Path, what: str, runs: Sequence[Planned], preset: Sequence[str]) -> None:
    """Add the runs to the plan in DIR/sweep.yaml. Raises UserError if the file contains something else."""
    new = {run.name: StoredRun(preset=list(preset), config=_sparse(run.config)) for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / LOCK):
        plan = Plan(schema=SCHEMA, sweep=what, runs={**read_plan(out / PLAN).runs, **new})
        write_atomically(out / PLAN, yaml.safe_dump(plan.model_dump(by_alias=True), sort_keys=False))


def _sparse(config: RunConfig) -> JsonObject:
    """The configuration without the fields that have their defaults; config.from_dict restores it."""
    defaults, tree = to_dict(RunConfig()), to_dict(config)
    sparse: JsonObject = {"schema": tree["schema"], "method": config.method, "seed": config.seed}
    for section, fields in tree.items():
        if isinstance(fields, Mapping):
            changed = {name: value for name, value in fields.items() if value != defaults[section][name]}
            sparse |= {section: changed} if changed else {}
    return sparse
