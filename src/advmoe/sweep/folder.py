"""A sweep's folder: one folder for each run, and the plan in DIR/sweep.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from advmoe.config import RunConfig, differences, read_mapping, shown, to_dict
from advmoe.errors import UserError
from advmoe.files import write_atomically
from advmoe.sweep.plan import Planned
from advmoe.training.checkpoint import RunFolder

PLAN = "sweep.yaml"
PROBE = ".probe.json"
SCHEMA = 1


def check_free(folder: Path, config: RunConfig, flag: str = "--out") -> None:
    """Raises UserError where something else is in a run's place, which `flag` gives another of."""
    held = RunFolder(folder)
    if held.config_path.exists():
        other = differences(held.config(), config)
        if other:
            raise UserError(f"{folder}: holds another run ({other[0]}); give another {flag}, or the settings it was made with")
    elif folder.exists() and (not folder.is_dir() or any(not path.name.endswith(".draft") for path in folder.iterdir())):
        raise UserError(f"{folder}: is not an empty folder, nor one that holds a run; give another {flag}")


def keep_plan(out: Path, what: str, runs: Sequence[Planned], preset: Sequence[str]) -> None:
    """Write the plan, beside the runs of earlier plans in the same folder. Raises UserError where DIR/sweep.yaml is none."""
    path = out / PLAN
    kept = read_mapping(path) if path.exists() else {"schema": SCHEMA}
    if kept.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {shown(kept.get('schema'))} is not one this version reads ({SCHEMA}); move the file away")
    before = kept.get("runs", {})
    if not isinstance(before, dict):
        raise UserError(f"{path}: runs must be a mapping of names; move the file away")
    told = {run.name: {"preset": list(preset), "config": _sparse(run.config)} for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump({"schema": SCHEMA, "sweep": what, "runs": {**before, **told}}, sort_keys=False))


def _sparse(config: RunConfig) -> dict[str, Any]:
    """The configuration without what is as by default; config.from_dict makes it again."""
    usual, tree = to_dict(RunConfig()), to_dict(config)
    found: dict[str, Any] = {"schema": tree["schema"], "method": config.method, "seed": config.seed}
    for section, fields in tree.items():
        if isinstance(fields, dict):
            own = {name: value for name, value in fields.items() if value != usual[section][name]}
            found |= {section: own} if own else {}
    return found
