"""Log the figures of a run to TensorBoard or Weights & Biases (`advmoe train --track`).

RUN/tensorboard, RUN/wandb    the tracker's files, and written.json: the last step and its sums, after which a resumed run goes on,
                              and the run's configuration

A step is an iteration, counted over the full run. A row of metrics.jsonl is logged at the last step of its epoch.
"""

import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from advmoe.config import RunConfig, differences, from_dict, to_dict
from advmoe.config.choices import TrackerName
from advmoe.errors import UserError
from advmoe.files import write_atomically, write_json
from advmoe.training.checkpoint import RunFolder
from advmoe.training.groups import GROUPS, MATRIX
from advmoe.training.manifest import EpochRow
from advmoe.training.observers import Observer
from advmoe.training.steps import Metrics
from advmoe.training.totals import image_count

ID = "id.txt"  # in the folder of Weights & Biases
EVERY = 50  # iterations between two logged losses; each logged loss synchronises with the device
LIBRARIES: dict[TrackerName, str] = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


Sums = dict[str, tuple[float, float]]  # loss -> its sum since the start of the epoch, and the number of images


class Sink(Protocol):
    """A tracker that figures are written to. Steps increase from call to call."""

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of one step to the disk, or send them."""

    def close(self) -> None:
        """Finish writing. No call follows."""


class TensorBoard:
    """Event files in `folder`. Entries after the step `written` come from a killed process and are ignored."""

    def __init__(self, library: Any, folder: Path, config: RunConfig, written: int) -> None:
        self.writer = library.SummaryWriter(str(folder), purge_step=written + 1)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run. It keeps its id when it is resumed, so the service joins the parts. WANDB_MODE=offline needs no network.

    Raises UserError if the service cannot be used.
    """

    def __init__(self, library: Any, folder: Path, config: RunConfig, written: int) -> None:
        try:
            self.run = library.init(
                project=os.environ.get("WANDB_PROJECT", "advmoe"), name=folder.parent.name, dir=str(folder.parent),
                id=_run_id(folder), resume="allow", config=to_dict(config), settings=library.Settings(silent=True),
            )  # fmt: skip
        except library.Error as error:
            raise UserError(f"--track wandb: {error} (WANDB_MODE=offline needs no account and no network)") from None

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[TrackerName, Callable[[Any, Path, RunConfig, int], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Tracker(Observer):
    """Writes the row of each epoch, and the mean losses of each `every` iterations, to RUN/`name`.

    Nothing is written before the first iteration, because train() needs an empty folder. Then, or at the end of the run, earlier
    epochs that are not yet in the tracker are written too. Raises UserError if the library is not installed.
    """

    def __init__(self, name: TrackerName, run: Path, config: RunConfig, every: int = EVERY) -> None:
        self.name, self.folder, self.config, self.every = name, run / name, config, every
        self.library = _library(name)
        self.sink: Sink | None = None
        self.written = 0
        self.last_sums: Sums = {}

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._open()
        finally:
            if self.sink is not None:
                self.sink.close()

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        sink, step = self._open(), (epoch - 1) * total + done
        if done < total and done % self.every == 0 and step > self.written:
            self._write(sink, self._losses(sums, images), step)

    def epoch(self, row: EpochRow) -> None:
        self._write_epoch(self._open(), row)

    def _open(self) -> Sink:
        """The sink. The first call opens it and writes the earlier epochs that it lacks."""
        if self.sink is None:
            self.written, self.last_sums = _last_written(self.folder, self.config)
            self.sink = SINKS[self.name](self.library, self.folder, self.config, self.written)
            latest = RunFolder(self.folder.parent).latest()
            for row in latest.history if latest else []:
                self._write_epoch(self.sink, row)
        return self.sink

    def _write_epoch(self, sink: Sink, row: EpochRow) -> None:
        step = row["epoch"] * row["iterations"]
        if step > self.written:
            self.last_sums = {}
            self._write(sink, figures(row), step)

    def _write(self, sink: Sink, content: Mapping[str, float], step: int) -> None:
        sink.write(content, step)
        self.written = step
        write_json(_written_path(self.folder), {"step": step, "sums": self.last_sums, "config": to_dict(self.config)})

    def _losses(self, sums: Metrics, images: int) -> dict[str, float]:
        """Mean losses over the images since the last step that was written, or since the start of the epoch."""
        current: Sums = {
            name: (float(sums[name]), float(image_count(name, sums, images))) for name in ("loss", "router_loss") if name in sums
        }
        last, self.last_sums = self.last_sums, current
        since = {name: [a - b for a, b in zip(current[name], last.get(name, (0.0, 0.0)), strict=True)] for name in current}
        return {f"iteration/{name}": loss / count for name, (loss, count) in since.items() if count}


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as flat figures, such as 'epoch/val_ra' or 'epoch/load/0/1' (layer, expert); `dead` is counted.

    Confusions and groups of classes are not logged.
    """
    flat: dict[str, float] = {}
    for name, value in row.items():
        if name in (MATRIX, GROUPS):
            continue
        flat |= _flat(f"epoch/{name}", sum(map(len, value)) if name == "dead" else value)
    return flat


def _flat(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, list):
        return {key: leaf for number, item in enumerate(value) for key, leaf in _flat(f"{name}/{number}", item).items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def _library(name: TrackerName) -> ModuleType:
    try:
        return importlib.import_module(LIBRARIES[name])
    except ImportError:
        raise UserError(f"--track {name} needs the library {name}: pip install 'advmoe[{name}]'") from None


def _written_path(folder: Path) -> Path:
    return folder / "written.json"


def _last_written(folder: Path, config: RunConfig) -> tuple[int, Sums]:
    """The last step that an earlier process wrote, or 0, and its sums. Creates the folder.

    A run that has saved nothing may be started again with other settings: the tracker then starts anew. Raises UserError if
    written.json is damaged.
    """
    folder.mkdir(exist_ok=True)
    path = _written_path(folder)
    try:
        written: Any = json.loads(path.read_text()) if path.exists() else {"step": 0, "sums": {}}
        if "config" in written and differences(from_dict(written["config"], str(path)), config):
            (folder / ID).unlink(missing_ok=True)
            return 0, {}
        sums = {name: (float(loss), float(count)) for name, (loss, count) in written.get("sums", {}).items()}
        return int(written["step"]), sums
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; remove {folder} to track the run anew") from None


def _run_id(folder: Path) -> str:
    """The id of the run at the service. It is created once and kept in id.txt."""
    path = folder / ID
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text().strip()
