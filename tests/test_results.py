"""Each committed result lies beside the sweep file that reproduces it."""

import json
from pathlib import Path

import pytest

from advmoe import migrations
from advmoe.config import differences, from_dict
from advmoe.sweep.grid import read_sweep
from advmoe.sweep.plan import plan

RESULTS = Path(__file__).parents[1] / "results"
FILES = sorted(RESULTS.rglob("*.yaml"))


def records_of(path: Path) -> Path:
    return path.with_name("records.json") if path.name == "sweep.yaml" else path.with_suffix(".json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_the_sweep_file_plans_the_runs_of_its_records_and_names_its_command(path: Path) -> None:
    runs, records = plan(read_sweep(str(path))), records_of(path)
    assert f"advmoe sweep {path.relative_to(RESULTS.parent)} --out " in path.read_text()
    assert f"--records {records.relative_to(RESULTS.parent)}" in path.read_text()
    configs = [from_dict(migrations.config(record["config"])) for record in json.loads(records.read_text())]
    for config in configs:
        assert sum(differences(config, run.config) == [] for run in runs) == 1
    assert 0 < len(configs) <= len(runs)
