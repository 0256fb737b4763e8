"""Training runs in separate processes, and the files that they write."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advmoe.training.checkpoint import LOCK, RunFolder

SABOTAGE = Path(__file__).with_name("sabotage.py")
SEED = int(os.environ.get("FAULTS_SEED", "20231"))  # of the moments at which processes are killed
PATIENCE = 300  # seconds for a run of seconds
UNEQUAL = re.compile("_seconds$|^commit$")  # fields of an epoch that can differ between equal runs
ALWAYS = ("--save-minutes", "0")  # a checkpoint after every iteration

Faults = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Ended:
    """How a process ended; `text` is everything it wrote."""

    status: int
    output: str
    error: str

    @property
    def text(self) -> str:
        return self.output + self.error

    @property
    def error_line(self) -> str:
        """The only line on stderr that is no warning. Fails if there are more, for example a traceback."""
        lines = [line for line in self.error.strip().splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, self.error
        return lines[0]


def start(arguments: Sequence[str | Path], faults: Faults | None = None) -> subprocess.Popen[str]:
    """Start `advmoe` with these arguments and with the given faults injected."""
    program = ["-m", "advmoe"] if faults is None else [str(SABOTAGE), json.dumps(faults)]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for a process."""
    output, error = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, output, error)


def advmoe(*arguments: str | Path, faults: Faults | None = None) -> Ended:
    """Run `advmoe` to its end."""
    return end(start(arguments, faults))


def trained(*arguments: str | Path, faults: Faults | None = None) -> Ended:
    """Run `advmoe` to its end; it must succeed."""
    ended = advmoe(*arguments, faults=faults)
    assert ended.status == 0, ended.text
    return ended


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for `condition` while the process runs."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, end(process).text
        assert time.monotonic() < limit, "the process hangs"
        time.sleep(0.01)


@contextmanager
def in_a_step(arguments: Sequence[str | Path], run: Path, step: int) -> Iterator[subprocess.Popen[str]]:
    """A process that continues the run and waits in the middle of a step (counted from its start) while the block runs."""
    marker = run.with_name("marker")
    process = start(arguments, {"wait": {"step": step, "seconds": PATIENCE, "marker": str(marker)}})
    try:
        until(marker.exists, process)
        yield process
    finally:
        marker.unlink(missing_ok=True)


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the fields that may differ between equal runs."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not UNEQUAL.search(name)} for line in lines]


def files(run: Path) -> list[str]:
    """The paths in a run's folder, without the lock, which may remain."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != LOCK)


def drafts(run: Path) -> list[str]:
    """Temporary files and folders."""
    return [name for name in files(run) if "draft" in name]


def assert_same(run: Path, unbroken: Path) -> None:
    """Check that a run has the metrics, the files and every bit of weights and optimizers of the undisturbed one."""
    assert rows(run) == rows(unbroken)
    assert files(run) == files(unbroken)
    for checkpoint, expected in zip(RunFolder(run).checkpoint_folders(), RunFolder(unbroken).checkpoint_folders(), strict=True):
        assert (checkpoint / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes(), checkpoint.name
        assert equal(*(torch.load(folder / "optimizers.pt", weights_only=True) for folder in (checkpoint, expected))), (
            checkpoint.name
        )


def equal(value: Any, expected: Any) -> bool:
    """Whether two trees of tensors and plain values are the same to the bit."""
    if isinstance(value, torch.Tensor):
        return torch.equal(value, expected)
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(equal(item, expected[name]) for name, item in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(expected) and all(map(equal, value, expected))
    return bool(value == expected)
