"""How a run stands, for who watches it: what a sweep reads from its folder, its rows and Record, and its last sign of life."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from advmoe.config import RunConfig
from advmoe.errors import UserError, lookup
from advmoe.evaluation.record_rules import is_number
from advmoe.sweep.states import FAILED, mark_failed, state_of
from advmoe.training.checkpoint import RunFolder
from advmoe.training.methods import METHODS
from advmoe.training.steps import Metrics

Phase = Literal["training", "stalled", "trained", "evaluating", "done", "failed"]
PATIENCE = 600  # seconds without a sign of life that are no sign of death
FIRST_EPOCH = 3600  # the same while nobody knows how long an epoch takes
SLOWER = 3  # how many times the longest epoch, or attack on a shard, the next may take


@dataclass(frozen=True)
class RunState:
    """One run. `rows` are metrics.jsonl's, `age` the seconds since a file changed; `config` is None where it cannot be read."""

    path: Path
    state: Phase
    age: float
    config: RunConfig | None = None
    epochs: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] | None = None
    shards: int = 0
    reason: str = ""

    @property
    def epoch(self) -> int:
        """Epochs done, of `epochs` over all phases."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0


class Outcome:
    """Leaves failed.txt where training ends in an error, and removes it where training goes on; a training Listener.

    Before the first iteration it leaves nothing: what is refused there may be another process's run.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.begun = run, False

    def __enter__(self) -> "Outcome":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.begun and isinstance(error, Exception):
            mark_failed(self.run, " ".join(str(error).split()) or type(error).__name__)

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        if not self.begun:
            (self.run / FAILED).unlink(missing_ok=True)
        self.begun = True

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Nothing: the loop has written it."""

    def note(self, text: str) -> None:
        """Nothing: a warning is no failure."""


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs below `folder` (itself too), in order of their names. A run holds no other run."""
    for place, inner, files in os.walk(folder):
        if "config.yaml" in files:
            inner.clear()
            yield Path(place)
        inner.sort()


def read_run(path: Path) -> RunState:
    """How the run in `path` stands. Whatever is damaged there is left out or told as the reason of a failure; raises nothing."""
    signs = _signs(path)
    seen = _Seen(
        max(0.0, time.time() - max(signs.values(), default=0.0)), signs, _rows(path / "metrics.jsonl"),
        _mapping(path / "record.json"), [_mapping(file) or {} for file in path.glob("evaluation/shard-*.json")],
    )  # fmt: skip
    config, epochs, reason = None, 0, ""
    try:
        config = RunFolder(path).config()
        lookup(METHODS, config.method, "method")
        known = state_of(path)
        epochs, reason = known.epochs, known.line
    except (UserError, OSError) as error:
        reason = str(error)
    if "record.json" in signs and seen.record is None:
        reason = reason or "record.json is damaged"
    elif signs.get("record.json", 0.0) > signs.get(FAILED, 0.0):
        reason = "" if epochs else reason  # evaluated since it failed
    trained = bool(seen.rows) and seen.rows[-1]["epoch"] >= epochs
    state: Phase = "failed" if reason else seen.evaluation() if trained else seen.training()
    return RunState(path, state, seen.age, config, epochs, seen.rows, seen.record, len(seen.shards), reason)


@dataclass(frozen=True)
class _Seen:
    """What lies in a run's folder; `signs` say when each file changed."""

    age: float
    signs: Mapping[str, float]
    rows: list[dict[str, Any]]
    record: dict[str, Any] | None
    shards: list[dict[str, Any]]

    def training(self) -> Phase:
        seconds = [number(row, "train_seconds") + number(row, "validate_seconds") for row in self.rows]
        return "training" if self.age <= _patience(seconds, PATIENCE if seconds else FIRST_EPOCH) else "stalled"

    def evaluation(self) -> Phase:
        """The state of a trained run."""
        attacks = [shard["attacks"].values() for shard in self.shards if isinstance(shard.get("attacks"), dict)]
        lively = self.age <= _patience([number(attack, "seconds") for own in attacks for attack in own], PATIENCE)
        evaluated = max((when for name, when in self.signs.items() if name.startswith("evaluation" + os.sep)), default=0.0)
        if self.record is not None and not (lively and evaluated > self.signs.get("record.json", math.inf)):
            return "done"
        if not evaluated:
            return "trained"
        return "evaluating" if lively else "stalled"


def _signs(path: Path) -> dict[str, float]:
    """When each file of a run last changed, by its name within the run; files go while one looks."""
    signs = {}
    for place, _, names in os.walk(path):
        for name in names:
            file = os.path.join(place, name)
            try:
                signs[os.path.relpath(file, path)] = os.lstat(file).st_mtime
            except OSError:
                continue
    return signs


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    parsed = [_parsed(line) for line in lines]
    return [row for row in parsed if row is not None and type(row.get("epoch")) is int and is_number(row["epoch"])]


def _mapping(path: Path) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_text(errors="replace"))
    except OSError:
        return None


def _parsed(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`, or None where it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _patience(seconds: list[float], least: float) -> float:
    """How long a run may be silent whose epochs, or attacks, took so long each."""
    return max(least, SLOWER * max(seconds, default=0.0))


def number(row: Any, name: str) -> float:
    """row[name] where that is a finite number, else 0."""
    value = row.get(name) if isinstance(row, Mapping) else None
    return float(value) if is_number(value) else 0.0
