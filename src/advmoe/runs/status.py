"""The status of a run, read from its folder alone. Sweeps and `advmoe watch` use it.

Files that are damaged, or that another process is writing, are skipped: nothing here raises an error.
"""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from advmoe.config import RunConfig
from advmoe.errors import UserError, lookup
from advmoe.files import json_object, parsed_object, write_atomically
from advmoe.training.checkpoint import RunFolder
from advmoe.training.methods import METHODS
from advmoe.training.observers import Observer
from advmoe.training.steps import Metrics

FAILED = "failed.txt"  # the error a run ended with; removed when the run is started again
LOG = "log.txt"  # output of a run that a sweep started
PATIENCE = 600  # seconds without a change in the folder before a run counts as stalled
FIRST_EPOCH = 3600  # the same, until the first epoch has ended
MAX_NUMBER = 1e300  # numbers in files must be smaller
SLOWER = 3  # an epoch, or an attack on a shard, may take this many times as long as the longest one before it


class State(StrEnum):
    """The states of a run, in the order in which it goes through them."""

    PLANNED = "planned"  # no folder, or an empty one
    TRAINING = "training"
    TRAINED = "trained"  # all epochs are done, and the evaluation has not begun
    EVALUATING = "evaluating"
    DONE = "done"
    STALLED = "stalled"  # training or evaluating, but no file has changed for a long time
    FAILED = "failed"


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.jsonl. Accuracies in percent of the held-out images; a field is None if it is not in the line.

    `load` has the share of images of each expert, for all MoE layers in one list.
    """

    epoch: int
    loss: float | None
    val_sa: float | None
    val_ra: float | None
    iterations: float | None
    train_seconds: float
    validate_seconds: float
    load: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Wall time of the epoch with its validation."""
        return self.train_seconds + self.validate_seconds


@dataclass(frozen=True)
class RecordSummary:
    """The part of record.json that sweeps and `advmoe watch` need. `attacks` were run, or skipped for a reason.

    `threat` is (norm, epsilon, seed of the attacks, limit_test); a value is None if it is not in the file.
    """

    sa: float | None
    ra_worst: float | None
    ra_worst_quick: float | None
    attacks: frozenset[str]
    seconds: float
    threat: tuple[str | None, float | None, int | None, int | None]


@dataclass(frozen=True)
class RunStatus:
    """The status of one run. `age` is the time in seconds since a file changed; `config` is None if it cannot be read; `reason`
    says why the run failed. `results` is the number of finished attacks on shards, `checkpoint` the name of the newest checkpoint.
    """

    path: Path
    state: State
    age: float = 0.0
    config: RunConfig | None = None
    epochs: int = 0
    rows: Sequence[EpochRow] = ()
    record: RecordSummary | None = None
    shards: int = 0
    results: int = 0
    checkpoint: str = ""
    reason: str = ""

    @property
    def epoch(self) -> int:
        """Number of finished epochs, out of `epochs` over all phases."""
        return self.rows[-1].epoch if self.rows else 0

    @property
    def progress(self) -> tuple[int, str, int]:
        """Grows with the work that is not lost when the run is stopped."""
        return self.epoch, self.checkpoint, self.results + (self.record is not None)

    def describe(self) -> str:
        """'training epoch 3 of 6', 'failed: out of memory', 'done'."""
        if self.state is State.TRAINING:
            return f"training epoch {self.epoch + 1} of {self.epochs}"
        return f"failed: {self.reason}" if self.state is State.FAILED else self.state.value

    def phase_seconds(self) -> Mapping[int, Sequence[float]]:
        """Wall times of the finished epochs, by the number of their phase (from 0)."""
        phases: dict[int, list[float]] = {}
        for row in self.rows:
            if self.config is not None and row.seconds > 0:
                phases.setdefault((row.epoch - 1) // self.config.training.epochs, []).append(row.seconds)
        return phases

    def evaluation_seconds(self, attacks: Collection[str]) -> float | None:
        """Wall time of the run's evaluation; None if it was by other attacks than these."""
        if self.record is None or self.record.attacks != frozenset(attacks):
            return None
        return self.record.seconds or None


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs in `folder`, at any depth, and `folder` itself if it is a run, ordered by name. A run contains no other
    run."""
    for parent, folders, files in os.walk(folder):
        if "config.yaml" in files:
            folders.clear()
            yield Path(parent)
        folders.sort()


def read_run(path: Path, attacks: Collection[str] | None = None) -> RunStatus:
    """The status of the run in `path`.

    Without `attacks` a run is done when it has a Record. With `attacks`, the Record must contain all of them, with the threat
    model, the number of images and the seed of the run's configuration.
    """
    if not (path / "config.yaml").exists():
        return RunStatus(path, State.PLANNED)
    changes = _changes(path)
    config, epochs, reason = _read_config(path)
    record_path = path / "record.json"
    record = _cached(record_path, _record)
    failure = _text(path / FAILED)
    if changes.get("record.json", 0.0) > changes.get(FAILED, 0.0):
        failure = ""  # it was evaluated after it had failed
    reason = reason or failure
    if record is None and record_path.exists():
        reason = reason or "record.json is damaged"
    shards = [times for shard in sorted(path.glob("evaluation/shard-*.json")) if (times := _cached(shard, _shard)) is not None]
    files = _Files(changes, _cached(path / "metrics.jsonl", _rows) or (), record, shards, config, attacks)
    trained = bool(files.rows) and files.rows[-1].epoch >= epochs
    state = State.FAILED if reason else files.evaluation() if trained else files.training()
    return RunStatus(
        path, state, files.age, config, epochs, files.rows, record, sum(1 for _ in path.glob("evaluation/shard-*.json")),
        sum(map(len, shards)), max((name for name in _names(path / "checkpoints")), default=""), reason,
    )  # fmt: skip


def mark_failed(folder: Path, line: str) -> None:
    """Write the error with which the run in `folder` ended."""
    write_atomically(folder / FAILED, f"{line}\n")


class FailureRecorder(Observer):
    """Writes failed.txt when training ends in an error, and removes it when training goes on.

    Before the first iteration it writes nothing, because another process may be training in the folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.begun = run, False

    def __enter__(self) -> "FailureRecorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.begun and isinstance(error, Exception):
            mark_failed(self.run, " ".join(str(error).split()) or type(error).__name__)

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        if not self.begun:
            (self.run / FAILED).unlink(missing_ok=True)
        self.begun = True


@dataclass(frozen=True)
class _Files:
    """The content of a run's files: `changes` has the time of each file's last change, `shards` the seconds of each attack on a
    shard."""

    changes: Mapping[str, float]
    rows: Sequence[EpochRow]
    record: RecordSummary | None
    shards: Sequence[Sequence[float]]
    config: RunConfig | None
    attacks: Collection[str] | None
    now: float = field(default_factory=time.time)

    @property
    def age(self) -> float:
        return max(0.0, self.now - max(self.changes.values(), default=0.0))

    def training(self) -> State:
        """The state of a run whose epochs are not all done."""
        patience = _patience([row.seconds for row in self.rows], PATIENCE if self.rows else FIRST_EPOCH)
        return State.TRAINING if self.age <= patience else State.STALLED

    def evaluation(self) -> State:
        """The state of a trained run."""
        active = self.age <= _patience([seconds for shard in self.shards for seconds in shard], PATIENCE)
        evaluated = max((change for name, change in self.changes.items() if name.startswith("evaluation" + os.sep)), default=0.0)
        newer = self.record is None or evaluated > self.changes.get("record.json", 0.0)
        if self.is_evaluated() and not (active and newer):
            return State.DONE
        if not evaluated or not newer:
            return State.TRAINED
        return State.EVALUATING if active else State.STALLED

    def is_evaluated(self) -> bool:
        """Whether the Record is that of the requested evaluation."""
        if self.record is None or self.attacks is None or self.config is None:
            return self.record is not None
        requested = ("Linf", self.config.attack.epsilon, 0, self.config.data.limit_test)
        return self.record.threat == requested and self.record.attacks >= frozenset(self.attacks)


# Tolerant readers


def _read_config(path: Path) -> tuple[RunConfig | None, int, str]:
    """The configuration, its number of epochs over all phases, and why it cannot be read."""
    try:
        status = (path / "config.yaml").stat()
        config = _config(path, status.st_mtime_ns, status.st_size)
        phases = lookup(METHODS, config.method, "method").phases
    except (UserError, OSError) as error:
        return None, 0, str(error)
    return config, config.training.epochs * len(phases), ""


@lru_cache(maxsize=4096)
def _config(path: Path, changed: int, size: int) -> RunConfig:
    return RunFolder(path).config()


def _cached(path: Path, read: Any) -> Any:
    """read(path), which is called again only after the file has changed; None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _cached_read(path, read, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16384)
def _cached_read(path: Path, read: Any, changed: int, size: int) -> Any:
    return read(path)


def _record(path: Path) -> RecordSummary | None:
    content = json_object(path)
    if content is None:
        return None
    evaluation, config = _mapping(content, "evaluation"), _mapping(content, "config")
    attacks, left_out = _mapping(evaluation, "attacks"), _mapping(evaluation, "left_out")
    seed, limit = content.get("attack_seed"), _mapping(config, "data").get("limit_test")
    norm = content.get("norm")
    return RecordSummary(
        number(content, "sa"), number(content, "ra_worst"), number(content, "ra_worst_quick"),
        frozenset((*attacks, *left_out)),
        # the seconds of a resumed evaluation are those since it was resumed; the attacks' seconds are complete
        max(number(content, "evaluate_seconds") or 0.0, sum(number(attack, "seconds") or 0.0 for attack in attacks.values())),
        (
            norm if isinstance(norm, str) else None, number(content, "epsilon"),
            seed if type(seed) is int else None, limit if type(limit) is int else None,
        ),
    )  # fmt: skip


def _shard(path: Path) -> tuple[float, ...]:
    """Seconds of each attack on a shard."""
    return tuple(number(attack, "seconds") or 0.0 for attack in _mapping(json_object(path) or {}, "attacks").values())


def _rows(path: Path) -> tuple[EpochRow, ...]:
    """The complete lines of a metrics.jsonl."""
    parsed = (parsed_object(line) for line in _text(path).splitlines())
    return tuple(_row(row) for row in parsed if row is not None and type(row.get("epoch")) is int and _is_number(row["epoch"]))


def _row(row: Mapping[str, Any]) -> EpochRow:
    layers = row.get("load")
    shares = [share for layer in layers if isinstance(layer, list) for share in layer] if isinstance(layers, list) else []
    return EpochRow(
        row["epoch"], number(row, "loss"), number(row, "val_sa"), number(row, "val_ra"), number(row, "iterations"),
        number(row, "train_seconds") or 0.0, number(row, "validate_seconds") or 0.0,
        tuple(float(share) for share in shares if _is_number(share)),
    )  # fmt: skip


def number(row: Any, name: str) -> float | None:
    """row[name], or None if it is not a finite number."""
    value = row.get(name) if isinstance(row, Mapping) else None
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether the value is a finite number in the range of a float, and not a bool."""
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, Mapping) else {}


def _changes(path: Path) -> dict[str, float]:
    """Path in the run's folder -> time of the file's last change. Files that vanish meanwhile are skipped."""
    changes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            try:
                changes[os.path.relpath(file, path)] = os.lstat(file).st_mtime
            except OSError:
                continue
    return changes


def _names(folder: Path) -> list[str]:
    """Names of the checkpoints, which sort by age."""
    try:
        return [name for name in os.listdir(folder) if name.startswith("epoch-")]
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _patience(seconds: Sequence[float], least: float) -> float:
    """The time without a changed file after which a run counts as stalled, from the `seconds` of its epochs or attacks."""
    return max(least, SLOWER * max(seconds, default=0.0))
