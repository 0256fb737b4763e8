"""The files in results/ that the pages show."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from advmoe import migrations
from advmoe.benchmark.rows import Report
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import checked_record
from advmoe.reports.collect import collect

ROOT = Path(__file__).parents[2]
MORE_IMAGES = "results/evaluation/cifar10_quick_4000.json"  # 4,000 test images instead of 1,000
RUN_PREFIX = "cifar10-resnet18-"  # of the runs and recipes in results/cifar10-jpeg and results/choices


def read(path: str) -> Any:
    """A JSON file of the repository."""
    return migrations.renamed(json.loads((ROOT / path).read_text()))


def records(path: str) -> list[Record]:
    """The Records of a file of the repository."""
    return [checked_record(content, path) for content in read(path)]


def main_records() -> list[Record]:
    """The Records that README shows."""
    return collect(ROOT / "results/cifar10-jpeg")


def report(name: str) -> Report:
    """A file that `advmoe benchmark --json` wrote."""
    return Report.read(ROOT / "results/benchmarks" / f"{name}.json")


def by_network(evaluated: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Network -> seed -> Record: the run cifar10-resnet18-advmoe-plus-s0 is seed 0 of the network advmoe-plus."""
    runs: dict[str, dict[int, Record]] = {}
    for record in evaluated:
        assert record.run is not None  # a sweep names its runs
        runs.setdefault(record.run.removeprefix(RUN_PREFIX).removesuffix(f"-s{record.seed}"), {})[record.seed] = record
    return runs


def paired_seeds(runs: dict[str, dict[int, Record]], network: str, other: str) -> list[tuple[Record, Record]]:
    """The Records of two networks, for each seed that both have."""
    return [(record, runs[other][seed]) for seed, record in runs.get(network, {}).items() if seed in runs.get(other, {})]
