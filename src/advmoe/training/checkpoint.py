"""The folder of a run: configuration, metrics, checkpoints. Each file is written under a temporary name, then renamed.

RUN/config.yaml
RUN/metrics.jsonl                    one line per epoch
RUN/.train.lock                      locked by the process that trains; contains its name
RUN/checkpoints/epoch-0007-000120/   a checkpoint within an epoch: after 7 epochs and 120 iterations of the next
RUN/checkpoints/epoch-0007/          model.safetensors, optimizers.pt, manifest.json (history, format of the images, SHA-256
                                     of the other files)
RUN/record.json                      written by `advmoe evaluate`
"""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.optimizer import StateDict

from advmoe import locks, migrations
from advmoe.config import CONFIG_FILE, RunConfig, differences, dump_yaml, load_run_config
from advmoe.data import ImageSpec
from advmoe.errors import UserError, reason_of
from advmoe.files import check_plain, check_utf8, sync, write_atomically
from advmoe.training.manifest import FILES, SCHEMA, STATES, WEIGHTS, History, Manifest, Partial, Progress, read_manifest

MAX_FILE = 2**40  # bytes
LOCK, METRICS = ".train.lock", "metrics.jsonl"
NUMBERS = re.compile(r"\d+")
KEPT = 2  # number of latest checkpoints to keep; the best one is kept too


@dataclass(frozen=True)
class Checkpoint:
    """The state after epoch `epoch` (counted from 1 over all phases), or within the next epoch if `partial` is set.

    `restores` counts how often the run went back to a checkpoint after a NaN. `spec` is None in checkpoints of old versions.
    `schema` is that of its manifest.
    """

    folder: Path
    epoch: int
    history: History
    fingerprint: str
    spec: ImageSpec | None = None
    partial: Partial | None = None
    restores: int = 0
    schema: int = SCHEMA

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name. Raises UserError if the file cannot be read."""
        try:
            return migrations.tensors(load_file(self.folder / WEIGHTS), self.schema)
        except Exception as error:  # a malicious header can raise nearly any exception
            raise UserError(f"{self.folder}: holds no weights ({reason_of(error, named=True)})") from None

    @property
    def train_seconds(self) -> float:
        """Wall time of the iterations of all epochs, in seconds."""
        return float(sum(row.get("train_seconds", 0.0) for row in self.history))

    def optimizer_states(self) -> dict[str, StateDict]:
        """State dicts of the optimizers by level. Raises UserError if the file cannot be read."""
        path = self.folder / STATES
        try:
            _check_unpacked(path)
            states = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
                raise TypeError
        except Exception as error:  # a malicious or damaged pickle can raise nearly any exception; its code does not run
            raise UserError(f"{path}: not optimizer states ({type(error).__name__})") from None
        return states


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run on disk."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The file of the run's configuration."""
        return self.path / CONFIG_FILE

    @property
    def checkpoint_path(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def config(self) -> RunConfig:
        """The run's configuration. Raises UserError if the folder has no config.yaml."""
        if not self.config_path.exists():
            raise UserError(f"{self.path}: holds no run (no config.yaml)")
        return load_run_config(self.config_path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; create it if it is missing.

        Raises UserError if another process trains there, or if the folder has other files and no run.
        """
        check_utf8(self.path)
        if not self.config_path.exists():
            self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        activity = "training in this folder; wait for it to finish, or give another --out"
        with locks.locked(self.path / LOCK, self.path, activity, keep=True):
            yield

    def sign(self, launch: str = "") -> None:
        """Write the name of this process to the lock file, and the id of the torchrun `launch` that claimed the folder."""
        locks.sign(self.path / LOCK, launch)

    def was_claimed_by(self, launch: str) -> bool:
        """Whether a process of the torchrun `launch` claimed the folder before."""
        return bool(launch) and launch in locks.read_lines(self.path / LOCK)[1:]

    def claim(self, config: RunConfig, resume: bool) -> None:
        """Create the run in this folder, whose lock the caller holds: write `config`, also over a run that has saved nothing.

        Raises UserError as `check_free`, and for this run without `resume`.
        """
        if self.config_path.exists() and not self._has_results():
            if self.config() != config:
                write_atomically(self.config_path, dump_yaml(config))
            return
        self.check_free(config)
        if not self.config_path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config_path, dump_yaml(config))
        elif not resume:
            raise UserError(f"{self.path}: holds this run unfinished; add --resume to continue it, or give another --out")

    def check_free(self, config: RunConfig) -> None:
        """Raises UserError if the folder contains anything but the run of this configuration."""
        if self.config_path.exists():
            changed = differences(self.config(), config)
            if changed:
                raise UserError(f"{self.path}: holds another run ({changed[0]}); give another --out, or the settings of that run")
        else:
            self._check_empty()

    def _has_results(self) -> bool:
        return bool(self.checkpoint_folders()) or any((self.path / name).exists() for name in (METRICS, "record.json"))

    def _check_empty(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
            raise UserError(f"{self.path}: is neither an empty folder nor the folder of a run; give another --out")

    def checkpoint_folders(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(
            self.checkpoint_path.glob("epoch-*"), key=lambda folder: [int(digits) for digits in NUMBERS.findall(folder.name)]
        )

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None."""
        for folder in reversed(self.checkpoint_folders()):
            checkpoint = _open(folder)
            if checkpoint is not None:
                return checkpoint
        return None

    def damaged(self) -> list[str]:
        """Names of checkpoints that are incomplete or were changed."""
        return [folder.name for folder in self.checkpoint_folders() if _open(folder) is None]

    def best(self) -> Checkpoint:
        """The checkpoint of the best epoch on the held-out part, with the history of the full run.

        Raises UserError if there is none, or if it is damaged.
        """
        latest = self.latest()
        if latest is None or not latest.history:
            raise UserError(f"{self.path}: {self._without_epochs(latest)}")
        checkpoint = _open(self._folder(best_epoch(latest.history)))
        if checkpoint is None:
            raise UserError(f"{self._folder(best_epoch(latest.history))}: checkpoint missing or damaged")
        return replace(checkpoint, history=latest.history)

    def _without_epochs(self, latest: Checkpoint | None) -> str:
        """Message for a run without a complete checkpoint of an epoch."""
        damaged = self.damaged()
        if damaged:
            return f"holds only damaged checkpoints ({damaged[0]})"
        return "holds no checkpoint yet" if latest is None else "holds no checkpoint of a complete epoch yet"

    def save(
        self, model: Mapping[str, Tensor], optimizers: Mapping[str, StateDict], progress: Progress, fingerprint: str,
        spec: ImageSpec | None = None,
    ) -> None:  # fmt: skip
        """Write the checkpoint of a run that has made `progress`; remove checkpoints that are not needed any more.

        Raises UserError if it cannot be written, for example if the disk is full.
        """
        history, epoch = progress.history, len(progress.history)
        target = self._folder(epoch, progress.partial)
        draft = self.checkpoint_path / f".draft-{target.name}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            sums = _write(draft, model, optimizers)
            manifest = Manifest(
                epoch=epoch, fingerprint=fingerprint, history=history, spec=spec, partial=progress.partial,
                restores=progress.restores, sha256=sums,
            )  # fmt: skip
            (draft / "manifest.json").write_text(manifest.sealed())
            sync(draft / "manifest.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors raise if the disk is full
            shutil.rmtree(draft, ignore_errors=True)
            reason = _write_error(error, target.parent, sum(tensor.nbytes for tensor in model.values()))
            raise UserError(f"{target}: checkpoint could not be written ({reason}); earlier checkpoints are intact") from None
        if target.exists():
            _remove(target)
        draft.rename(target)
        if progress.partial is None:
            self.write_metrics(history)
        self.prune(history, target)

    def write_metrics(self, history: History) -> None:
        """Write `history` to metrics.jsonl, unless it is there already."""
        path, text = self.path / METRICS, "".join(json.dumps(row) + "\n" for row in history)
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)

    def clean(self) -> None:
        """Remove the temporary files of a killed training process. An evaluation or export may be writing other files here."""
        for draft in self.checkpoint_path.glob(".draft-*"):
            shutil.rmtree(draft)
        for name in (CONFIG_FILE, METRICS):
            for file in self.path.glob(f".{name}.*.draft"):
                file.unlink()

    def _folder(self, epoch: int, partial: Partial | None = None) -> Path:
        return self.checkpoint_path / (f"epoch-{epoch:04d}" + ("" if partial is None else f"-{partial.iteration:06d}"))

    def prune(self, history: History, newest: Path) -> None:
        """Keep the `newest`, the last KEPT, and the best checkpoint; remove the others, also those of a killed process."""
        kept = {newest, *(self._folder(len(history) - back) for back in range(KEPT))}
        kept |= {self._folder(best_epoch(history))} if history else set()
        within = [folder for folder in self.checkpoint_folders() if folder.name.startswith(f"{self._folder(len(history)).name}-")]
        kept |= set(within[-KEPT:])
        for folder in self.checkpoint_folders():
            if folder not in kept:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed to a draft first, so that it never looks like a damaged checkpoint."""
    renamed = folder.with_name(f".draft-old-{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def _is_foreign(path: Path) -> bool:
    """Whether a file in an unclaimed folder is neither the lock nor the draft of a config.yaml."""
    return path.name != LOCK and not (path.name.startswith(".config.yaml.") and path.name.endswith(".draft"))


def best_epoch(history: History) -> int:
    """The first epoch (from 1) of the last phase with the highest score on the held-out part."""
    rows = [row for row in range(len(history)) if history[row]["phase"] == history[-1]["phase"]]
    return 1 + max(rows, key=lambda row: (history[row]["score"], -row))


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, weights: StateDict | None = None) -> None:
    """Fill `model` from a checkpoint: with `weights`, or else with those of its weights' file.

    Raises UserError if they cannot be read or belong to another model.
    """
    state = checkpoint.model_state() if weights is None else weights
    try:
        model.load_state_dict(state)
    except Exception as error:  # any exception can come out of a state of another kind
        raise UserError(f"{checkpoint.folder}: holds another model's weights ({reason_of(error)})") from None


def _write(draft: Path, model: Mapping[str, Tensor], optimizers: Mapping[str, StateDict]) -> dict[str, str]:
    """Write weights and optimizer states. Returns their SHA-256 by file name."""
    draft.mkdir(parents=True)
    # safetensors' save_file makes a file that only its owner can read
    (draft / WEIGHTS).write_bytes(save({name: tensor.contiguous() for name, tensor in model.items()}))
    torch.save(dict(optimizers), draft / STATES)
    for path in draft.iterdir():
        sync(path)
    return {name: _sha256(draft / name) for name in FILES}


def _write_error(error: Exception, folder: Path, size: int) -> str:
    """The reason why a checkpoint could not be written.

    torch does not report a full disk as such. A checkpoint with its optimizers needs at most 4 times `size`, the weights' bytes.
    """
    if not isinstance(error, OSError) and shutil.disk_usage(folder).free < 4 * size:
        return "no space left on the disk"
    return reason_of(error)


def _open(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if a file is missing or damaged.

    Raises UserError if the checkpoint is intact but has a newer schema.
    """
    manifest = read_manifest(folder)
    try:
        if manifest is None or any(_sha256(folder / name) != digest for name, digest in manifest.sha256.items()):
            return None
    except (OSError, UserError):
        return None
    return Checkpoint(
        folder, manifest.epoch, manifest.history, manifest.fingerprint, manifest.spec, manifest.partial, manifest.restores,
        manifest.version,
    )  # fmt: skip


def _check_unpacked(path: Path) -> None:
    """Raises ValueError or BadZipFile if the archive would unpack to more bytes than the file has. torch never compresses."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(info.file_size for info in archive.infolist())
    if declared > path.stat().st_size:
        raise ValueError(f"{declared} bytes")


def _sha256(path: Path) -> str:
    check_plain(path, MAX_FILE)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
