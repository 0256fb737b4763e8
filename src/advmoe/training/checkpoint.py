"""A run's folder: configuration, metrics, checkpoints. Everything is written beside its place and renamed into it.

RUN/config.yaml
RUN/metrics.jsonl                    one line an epoch
RUN/.train.lock                      held, and named, by the process that trains
RUN/checkpoints/epoch-0007-000120/   the same within an epoch: after 7 epochs and 120 iterations of the next
RUN/checkpoints/epoch-0007/          model.safetensors, optimizers.pt, manifest.json (history, what the images are, SHA-256
                                     of the others)
RUN/record.json                      written by `advmoe evaluate`
"""

import hashlib
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from advmoe import migrations
from advmoe.config import RunConfig, differences, dump_yaml, from_dict, read_mapping
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.files import check_plain, check_utf8, sync, write_atomically
from advmoe.training.manifest import FILES, STATES, WEIGHTS, Manifest, Partial, read_manifest

MAX_FILE = 2**40  # bytes
LOCK = ".train.lock"
NUMBERS = re.compile(r"\d+")
KEPT = 2  # last checkpoints; the best one is kept beside them

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The state after an epoch (counted from 1 over all phases), or within the one after it: `partial`.

    `restores` counts how often the run went back after a NaN. `spec` is None in checkpoints older than that field.
    """

    folder: Path
    epoch: int
    history: History
    fingerprint: str
    spec: ImageSpec | None = None
    partial: Partial | None = None
    restores: int = 0

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers. Raises UserError where the file holds none."""
        try:
            return migrations.tensors(load_file(self.folder / WEIGHTS))
        except Exception as error:  # a hostile header raises nearly anything
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder}: holds no weights ({type(error).__name__}: {reason})") from None

    @property
    def train_seconds(self) -> float:
        """Wall time of all epochs' iterations."""
        return float(sum(row["train_seconds"] for row in self.history))

    def optimizer_states(self) -> dict[str, Any]:
        """State dicts of the optimizers by level. Raises UserError where the file holds none."""
        path = self.folder / STATES
        try:
            _check_unpacked(path)
            states = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
                raise TypeError
        except Exception as error:  # a hostile or damaged pickle raises nearly anything; its code does not run
            raise UserError(f"{path}: not optimizer states ({type(error).__name__})") from None
        return states


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoints"

    def config(self) -> RunConfig:
        """The run's configuration. Raises UserError where the folder holds no run."""
        if not self.config_path.exists():
            raise UserError(f"{self.path}: holds no run (no config.yaml)")
        return from_dict(migrations.config(read_mapping(self.config_path)), str(self.config_path))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if missing, for this process alone. Raises UserError where another one trains there, or where
        something else lies there."""
        check_utf8(self.path)
        if not self.config_path.exists():
            self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with lock:
                self.sign()
                yield
        except Timeout:
            holder = self._signed()[0] or "another process"
            raise UserError(f"{self.path}: {holder} trains here; wait for its end, or give another --out") from None

    def sign(self, launch: str = "") -> None:
        """Say in the lock's file who holds it, and once the folder is claimed the torchrun that did."""
        (self.path / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n{launch}\n")

    def was_claimed_by(self, launch: str) -> bool:
        """Whether a process of that torchrun had claimed the folder."""
        return bool(launch) and self._signed()[1] == launch

    def _signed(self) -> tuple[str, str]:
        path = self.path / LOCK
        holder, launch, *_ = [*(path.read_text(errors="replace").splitlines() if path.exists() else []), "", ""]
        return holder, launch

    def claim(self, config: RunConfig, resume: bool) -> None:
        """Make the folder `config`'s. Raises UserError where it holds another run, or this one without `resume`."""
        if self.config_path.exists():
            other = differences(self.config(), config)
            if other:
                raise UserError(f"{self.path}: holds another run ({other[0]}); give another --out")
            if not resume:
                raise UserError(f"{self.path}: holds this run unfinished; add --resume to go on, or give another --out")
            return
        self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_path, dump_yaml(config))

    def _check_empty(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(map(_is_anothers, self.path.iterdir()))):
            raise UserError(f"{self.path}: is not an empty folder, nor one that holds a run; give another --out")

    def epochs(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(
            self.checkpoint_path.glob("epoch-*"), key=lambda folder: [int(digits) for digits in NUMBERS.findall(folder.name)]
        )

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, if there is any."""
        for folder in reversed(self.epochs()):
            checkpoint = _open(folder)
            if checkpoint is not None:
                return checkpoint
        return None

    def damaged(self) -> list[str]:
        """Names of checkpoints that are cut short or altered."""
        return [folder.name for folder in self.epochs() if _open(folder) is None]

    def best(self) -> Checkpoint:
        """The checkpoint of the best epoch on the held-out part, with the whole run's history.

        Raises UserError where there is none.
        """
        latest = self.latest()
        if latest is None or not latest.history:
            raise UserError(f"{self.path}: {self._without_epochs(latest)}")
        checkpoint = _open(self._folder(best_epoch(latest.history)))
        if checkpoint is None:
            raise UserError(f"{self._folder(best_epoch(latest.history))}: checkpoint missing or damaged")
        return replace(checkpoint, history=latest.history)

    def _without_epochs(self, latest: Checkpoint | None) -> str:
        """What a run holds that has no whole checkpoint of an epoch."""
        damaged = self.damaged()
        if damaged:
            return f"holds only damaged checkpoints ({damaged[0]})"
        return "holds no checkpoint yet" if latest is None else "holds no checkpoint of a whole epoch yet"

    def save(
        self, model: Mapping[str, Tensor], optimizers: Mapping[str, Any], history: History, fingerprint: str,
        spec: ImageSpec | None = None, partial: Partial | None = None, restores: int = 0,
    ) -> None:  # fmt: skip
        """Write the checkpoint of the last epoch in `history`, or of the `partial` one after it; drop what need not be kept."""
        epoch = len(history)
        target = self._folder(epoch, partial)
        draft = self.checkpoint_path / f".draft-{target.name}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            sums = _write(draft, model, optimizers)
            manifest = Manifest(
                epoch=epoch, fingerprint=fingerprint, history=history, spec=spec, partial=partial, restores=restores, sha256=sums
            )  # fmt: skip
            (draft / "manifest.json").write_text(manifest.sealed())
            sync(draft / "manifest.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own errors
            shutil.rmtree(draft, ignore_errors=True)
            reason = _why_unwritten(error, target.parent, sum(tensor.nbytes for tensor in model.values()))
            raise UserError(f"{target}: checkpoint could not be written ({reason}); earlier checkpoints are whole") from None
        if target.exists():
            _remove(target)
        draft.rename(target)
        if partial is None:
            self.write_metrics(history)
        self.prune(history, target)

    def write_metrics(self, history: History) -> None:
        """Make metrics.jsonl say what `history` says."""
        path, text = self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history)
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)

    def clean(self) -> None:
        """Remove drafts that a killed process left."""
        for draft in self.checkpoint_path.glob(".draft-*"):
            shutil.rmtree(draft)
        for file in self.path.glob(".*.draft"):
            file.unlink()

    def _folder(self, epoch: int, partial: Partial | None = None) -> Path:
        return self.checkpoint_path / (f"epoch-{epoch:04d}" + ("" if partial is None else f"-{partial.iteration:06d}"))

    def prune(self, history: History, newest: Path) -> None:
        """Remove the checkpoints that need not be kept beside the `newest`; some may be left where a process was killed."""
        kept = {newest, *(self._folder(len(history) - back) for back in range(KEPT))}
        kept |= {self._folder(best_epoch(history))} if history else set()
        within = [folder for folder in self.epochs() if folder.name.startswith(f"{self._folder(len(history)).name}-")]
        kept |= set(within[-KEPT:])
        for folder in self.epochs():
            if folder not in kept:
                _remove(folder)


def _remove(folder: Path) -> None:
    """By way of a draft's name: what is half removed is no damaged checkpoint."""
    doomed = folder.with_name(f".draft-old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _is_anothers(path: Path) -> bool:
    """Whether a file in an unclaimed folder is neither the lock nor what a process left that was killed while it claimed it."""
    return path.name != LOCK and not (path.name.startswith(".config.yaml.") and path.name.endswith(".draft"))


def best_epoch(history: History) -> int:
    """The first epoch (from 1) of the last phase with the highest score on the held-out part."""
    rows = [row for row in range(len(history)) if history[row]["phase"] == history[-1]["phase"]]
    return 1 + max(rows, key=lambda row: (history[row]["score"], -row))


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill `model` from a checkpoint. Raises UserError where it belongs to another model."""
    try:
        model.load_state_dict(checkpoint.model_state())
    except (RuntimeError, OSError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint.folder}: holds another model's weights ({first})") from None


def _write(draft: Path, model: Mapping[str, Tensor], optimizers: Mapping[str, Any]) -> dict[str, str]:
    """Write weights and optimizer states; gives their checksums by file name."""
    draft.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, draft / WEIGHTS)
    torch.save(dict(optimizers), draft / STATES)
    for path in draft.iterdir():
        sync(path)
    return {name: _sha256(draft / name) for name in FILES}


def _why_unwritten(error: Exception, folder: Path, size: int) -> str:
    """What kept a checkpoint from the disk. Of a full one torch tells a position in a file: 4 times the weights' size is what a
    checkpoint takes at most, with optimizers."""
    if not isinstance(error, OSError) and shutil.disk_usage(folder).free < 4 * size:
        return "no space left on the disk"
    return " ".join(str(error).split())[:200]


def _open(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if a file is missing or damaged.

    Raises UserError if it is intact and of a newer schema.
    """
    manifest = read_manifest(folder)
    try:
        if manifest is None or any(_sha256(folder / name) != digest for name, digest in manifest.sha256.items()):
            return None
    except (OSError, UserError):
        return None
    return Checkpoint(
        folder, manifest.epoch, manifest.history, manifest.fingerprint, manifest.spec, manifest.partial, manifest.restores
    )  # fmt: skip


def _check_unpacked(path: Path) -> None:
    """Raises ValueError or BadZipFile where torch would unpack more from the file than it has bytes: torch packs nothing."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(info.file_size for info in archive.infolist())
    if declared > path.stat().st_size:
        raise ValueError(f"{declared} bytes")


def _sha256(path: Path) -> str:
    check_plain(path, MAX_FILE)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
