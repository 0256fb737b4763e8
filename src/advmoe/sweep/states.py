"""How far a run is, read from its folder alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from advmoe.attacks.presets import resolve
from advmoe.errors import lookup
from advmoe.files import write_atomically
from advmoe.training.checkpoint import RunFolder
from advmoe.training.methods import METHODS

FAILED = "failed.txt"  # beside a run's other files: the line it failed with, until it is started again
LOG = "log.txt"


@dataclass(frozen=True)
class State:
    """`epoch` of `epochs` are trained, over all phases (0 of 0 before the run has a folder); `line` says why it failed."""

    kind: Literal["planned", "training", "evaluating", "done", "failed"]
    epoch: int = 0
    epochs: int = 0
    line: str = ""

    def __str__(self) -> str:
        if self.kind == "training":
            return f"training epoch {self.epoch + 1} of {self.epochs}"
        return f"failed: {self.line}" if self.kind == "failed" else self.kind


def state_of(folder: Path, preset: str | Sequence[str] | None = None) -> State:
    """The state of the run in `folder`. With `preset`, done is what has been evaluated by all of its attacks.

    Raises UserError where its configuration cannot be read, or `preset` names what there is not.
    """
    run = RunFolder(folder)
    if not run.config_path.exists():
        return State("planned")
    epochs, epoch = _epochs(run.config_path, run.config_path.stat().st_mtime_ns), _lines(folder / "metrics.jsonl")
    line = _text(folder / FAILED)
    if line:
        return State("failed", epoch, epochs, line)
    if epoch < epochs:
        return State("training" if epoch or (folder / LOG).exists() else "planned", epoch, epochs)
    attacks = frozenset(() if preset is None else resolve(preset).attacks)
    return State("done" if _is_evaluated(folder / "record.json", attacks) else "evaluating", epoch, epochs)


def mark_failed(folder: Path, line: str) -> None:
    """Write down why the run in `folder` failed."""
    write_atomically(folder / FAILED, f"{line}\n")


def _is_evaluated(path: Path, attacks: frozenset[str]) -> bool:
    known = _attacks(path, path.stat().st_mtime_ns) if path.exists() else None
    return known is not None and attacks <= known


@lru_cache(maxsize=4096)
def _attacks(path: Path, changed: int) -> frozenset[str] | None:
    """The attacks that the Record in `path` tells of, run or left out with a reason; None where it is no whole Record."""
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))["evaluation"]
        return frozenset({*evaluation["attacks"], *evaluation["left_out"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=4096)
def _epochs(path: Path, changed: int) -> int:
    config = RunFolder(path.parent).config()
    return config.training.epochs * len(lookup(METHODS, config.method, f"{path}: method").phases)


def _lines(path: Path) -> int:
    return len(_text(path).splitlines())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
