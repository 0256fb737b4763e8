"""The status of a run, read from its folder alone. Sweeps and `advmoe watch` use it.

Nothing here raises an error. Files that are damaged, or that another process is writing, are skipped (`advmoe.runs.run_files`),
except for the configuration and the Record: without them the run has failed.
"""

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from advmoe.attacks.autoattack import SUBSTITUTES
from advmoe.attacks.registry import ATTACKS
from advmoe.config import RunConfig
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import RECORD
from advmoe.files import walk
from advmoe.runs.failure import FAILED
from advmoe.runs.run_files import (
    EpochSummary,
    cached,
    epoch_summaries,
    last_changes,
    newest_checkpoint,
    read_config,
    read_text,
    recorded,
    shard_seconds,
)
from advmoe.training.methods import METHODS

LOG = "log.txt"  # output of a run that a sweep started
PATIENCE = 600  # seconds without a change in the folder before a run counts as stalled
FIRST_EPOCH = 3600  # the same, until the first epoch has ended
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


STYLES = {  # colours in a terminal, in the order in which runs are listed: those in progress first
    State.TRAINING: "green", State.EVALUATING: "green", State.STALLED: "yellow", State.FAILED: "red", State.TRAINED: "cyan",
    State.PLANNED: "dim", State.DONE: "dim",
}  # fmt: skip


@dataclass(frozen=True)
class RunStatus:
    """The status of one run. `age` is the time in seconds since a file changed; `config` is None if it cannot be read; `reason`
    says why the run failed. `results` is the number of finished attacks on shards, `checkpoint` the name of the newest checkpoint.
    `is_evaluated`: the requested evaluation is done, whatever the times of the files, from which `state` tells what goes on now.
    """

    path: Path
    state: State
    age: float = 0.0
    config: RunConfig | None = None
    epochs: int = 0
    rows: Sequence[EpochSummary] = ()
    record: Record | None = None
    shards: int = 0
    results: int = 0
    checkpoint: str = ""
    reason: str = ""
    is_evaluated: bool = False

    @property
    def epoch(self) -> int:
        """Number of finished epochs, out of `epochs` over all phases."""
        return self.rows[-1].epoch if self.rows else 0

    @property
    def progress(self) -> tuple[int, str, int]:
        """Changes with the work that is not lost when the run is stopped. It grows, unless stored results are deleted."""
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
        """Wall time of the run's evaluation; None if it was by other attacks than these. With few classes, AutoAttack's substitute
        was run too."""
        if self.record is None or not frozenset(attacks) <= _attacks(self.record) <= {*attacks, *SUBSTITUTES.values()}:
            return None
        # in Records of older versions, the seconds of a continued evaluation are those since it was continued
        return max(self.record.evaluate_seconds, sum(run.seconds for run in self.record.evaluation.attacks.values())) or None


def _attacks(record: Record) -> frozenset[str]:
    """The attacks that were run in their present versions, or skipped for a reason. An attack that is not registered here counts as
    present."""
    attacks = record.evaluation.attacks.items()
    present = [name for name, run in attacks if name not in ATTACKS or run.version == ATTACKS[name].version]
    return frozenset([*present, *record.evaluation.left_out])


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs in `folder`, at any depth, and `folder` itself if it is a run, ordered by name. A run contains no other
    run."""
    for parent, folders, files in walk(folder):
        if "config.yaml" in files:
            folders.clear()
            yield Path(parent)


def read_run(path: Path, attacks: Collection[str] | None = None) -> RunStatus:
    """The status of the run in `path`.

    Without `attacks` a run is evaluated when it has a Record. With `attacks`, the Record must contain all of them, with the threat
    model, the number of images and the seed of the run's configuration. A run whose folder, configuration or Record cannot be read
    has failed.
    """
    try:
        return _read_run(path, attacks)
    except OSError as error:
        return RunStatus(path, State.FAILED, reason=f"{error.filename or path}: {error.strerror or error}")


def _read_run(path: Path, attacks: Collection[str] | None) -> RunStatus:
    if not (path / "config.yaml").exists():
        return RunStatus(path, State.PLANNED)
    changes = last_changes(path)
    config, reason = read_config(path)
    record, unreadable = recorded(path)
    failure = read_text(path / FAILED)
    if changes.get(RECORD, 0.0) > changes.get(FAILED, 0.0):
        failure = ""  # it was evaluated after it had failed
    reason = reason or failure or unreadable
    shard_files = sorted(path.glob("evaluation/shard-*.json"))
    shards = [seconds for file in shard_files if (seconds := cached(file, shard_seconds)) is not None]
    files = _Files(changes, cached(path / "metrics.jsonl", epoch_summaries) or (), record, shards, config, attacks)
    epochs = 0 if config is None else _epochs(config, files.rows)
    trained = bool(files.rows) and files.rows[-1].epoch >= epochs
    state = State.FAILED if reason else files.evaluation() if trained else files.training()
    return RunStatus(
        path, state, age=files.age, config=config, epochs=epochs, rows=files.rows, record=record, shards=len(shard_files),
        results=sum(map(len, shards)), checkpoint=newest_checkpoint(path / "checkpoints"), reason=reason,
        is_evaluated=trained and not reason and files.is_evaluated(),
    )  # fmt: skip


def _epochs(config: RunConfig, rows: Sequence[EpochSummary]) -> int:
    """The number of epochs over all phases. For a method that is not registered here, the phases that have begun are counted."""
    of_phase, done = config.training.epochs, rows[-1].epoch if rows else 0
    begun = max(1, math.ceil(done / of_phase))
    return of_phase * (len(METHODS[config.method].phases) if config.method in METHODS else begun)


@dataclass(frozen=True)
class _Files:
    """The content of a run's files: `changes` has the time of each file's last change, `shards` the seconds of each attack on a
    shard."""

    changes: Mapping[str, float]
    rows: Sequence[EpochSummary]
    record: Record | None
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
        newer = self.record is None or evaluated > self.changes.get(RECORD, 0.0)
        if self.is_evaluated() and not (active and newer):
            return State.DONE
        if not evaluated or not newer:
            return State.TRAINED
        return State.EVALUATING if active else State.STALLED

    def is_evaluated(self) -> bool:
        """Whether the Record is that of the requested evaluation, and of the end of the run."""
        record = self.record
        if record is None or 0 < len(record.history) < len(self.rows):
            return False
        if self.attacks is None or self.config is None:
            return True
        threat = record.norm, record.epsilon, record.attack_seed, record.config.section("data").get("limit_test")
        requested = "Linf", self.config.attack.epsilon, 0, self.config.data.limit_test
        return threat == requested and _attacks(record) >= frozenset(self.attacks)


def _patience(seconds: Sequence[float], least: float) -> float:
    """The time without a changed file after which a run counts as stalled, from the `seconds` of its epochs or attacks."""
    return max(least, SLOWER * max(seconds, default=0.0))
