"""A Record: what a network withstands and costs, with what made it."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

import advmoe
from advmoe.config import RunConfig, to_dict
from advmoe.data import Splits
from advmoe.evaluation.cost import Cost

SCHEMA = 1


def make_record(
    config: RunConfig, splits: Splits, *, epoch: int, sa: float, ra: Mapping[str, float], network: Cost, dense: Cost,
    train_seconds: float, evaluate_seconds: float, attack_seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One JSON-ready dict. Accuracies in percent of `test_pictures`; `ra` by PGD steps; `gmacs` are the ideal ones."""
    return {
        "schema": SCHEMA,
        "method": config.method,
        "backbone": config.model.backbone,
        "dataset": splits.name,
        "sa": sa,
        "ra": dict(ra),
        "epsilon": config.attack.epsilon,
        "gmacs": network.gmacs_ideal,
        "gmacs_executed": network.gmacs_executed,
        "gmacs_dense": dense.gmacs_ideal,
        "reduction": 100 * (1 - network.gmacs_ideal / dense.gmacs_ideal),
        "params": network.params,
        "epoch": epoch,
        "train_pictures": len(splits.train),
        "test_pictures": len(splits.test),
        "fingerprint": splits.fingerprint,
        "seed": config.seed,
        "attack_seed": attack_seed,
        "config": to_dict(config),
        "train_seconds": train_seconds,
        "evaluate_seconds": evaluate_seconds,
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Code, versions, hardware and time."""
    cuda = torch.cuda.is_available()
    return {
        "advmoe": advmoe.__version__,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "hardware": {
            "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """JSON, written whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, '+changes' where files differ from it; None outside one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel"), "src", "advmoe").samefile(folder.parent):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
