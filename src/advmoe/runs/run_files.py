"""The files of a run's folder, read without errors: a file that is damaged, or that another process is writing, is skipped, or
the reason is returned."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from advmoe.config import CONFIG_FILE, RunConfig, load_run_config
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import RECORD, checked_record, read_json
from advmoe.files import json_object, parsed_object

Content = TypeVar("Content")

MAX_NUMBER = 1e300  # numbers in files must be smaller


@dataclass(frozen=True)
class EpochSummary:
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


def read_config(path: Path) -> tuple[RunConfig | None, str]:
    """The configuration, or why it cannot be read."""
    try:
        config = cached(path / CONFIG_FILE, load_run_config)
    except (UserError, OSError) as error:
        return None, str(error)
    return config, "" if config else f"{path}: holds no run (no {CONFIG_FILE})"


def recorded(path: Path) -> tuple[Record | None, str]:
    """The Record of a run without its images, or why it cannot be read; neither if there is no file."""
    try:
        return cached(path / RECORD, _record), ""
    except UserError as error:
        return None, str(error)


def _record(path: Path) -> Record:
    return checked_record(read_json(path), str(path))


def cached(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """read(path), which is called again only after the file has changed; None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return cast(Content, _cached_read(path, read, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=16384)
def _cached_read(path: Path, read: Any, changed: int, size: int) -> Any:
    return read(path)


def shard_seconds(path: Path) -> tuple[float, ...]:
    """Seconds of each attack on a shard."""
    return tuple(_number(attack, "seconds") or 0.0 for attack in _mapping(json_object(path) or {}, "attacks").values())


def epoch_summaries(path: Path) -> tuple[EpochSummary, ...]:
    """The complete lines of a metrics.jsonl."""
    parsed = (parsed_object(line) for line in read_text(path).splitlines())
    return tuple(
        _epoch_summary(row) for row in parsed if row is not None and type(row.get("epoch")) is int and _is_number(row["epoch"])
    )


def _epoch_summary(row: Mapping[str, Any]) -> EpochSummary:
    layers = row.get("load")
    shares = [share for layer in layers if isinstance(layer, list) for share in layer] if isinstance(layers, list) else []
    return EpochSummary(
        row["epoch"], _number(row, "loss"), _number(row, "val_sa"), _number(row, "val_ra"), _number(row, "iterations"),
        _number(row, "train_seconds") or 0.0, _number(row, "validate_seconds") or 0.0,
        tuple(float(share) for share in shares if _is_number(share)),
    )  # fmt: skip


def _number(row: Any, name: str) -> float | None:
    """row[name], or None if it is not a finite number."""
    value = row.get(name) if isinstance(row, Mapping) else None
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether the value is a finite number in the range of a float, and not a bool."""
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, Mapping) else {}


def last_changes(path: Path) -> dict[str, float]:
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


def newest_checkpoint(folder: Path) -> str:
    """The name of the newest checkpoint in a folder of checkpoints, whose names sort by age; empty if there is none."""
    try:
        return max((name for name in os.listdir(folder) if name.startswith("epoch-")), default="")
    except OSError:
        return ""


def read_text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
