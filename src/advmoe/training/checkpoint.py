"""A run's folder: configuration, metrics, checkpoints. Everything is written beside its place and renamed into it.

RUN/config.yaml
RUN/metrics.jsonl                    one line an epoch
RUN/checkpoints/epoch-0007/          model.safetensors, optimizers.pt, manifest.json (history, what the pictures are, SHA-256
                                     of the others)
RUN/record.json                      written by `advmoe evaluate`
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from advmoe.config import RunConfig, differences, dump_yaml, load_yaml
from advmoe.data import PictureSpec
from advmoe.errors import UserError
from advmoe.files import sync, write_atomically

SCHEMA = 1
KEPT = 2  # last checkpoints; the best one is kept beside them

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The state after an epoch (counted from 1 over all phases). `spec` is None in checkpoints older than that field."""

    folder: Path
    epoch: int
    history: History
    fingerprint: str
    spec: PictureSpec | None = None

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return load_file(self.folder / "model.safetensors")

    @property
    def train_seconds(self) -> float:
        """Wall time of all epochs' iterations."""
        return float(sum(row["train_seconds"] for row in self.history))

    def optimizer_states(self) -> dict[str, Any]:
        """State dicts of the optimizers by level."""
        path = self.folder / "optimizers.pt"
        try:
            states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
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
        return load_yaml(self.config_path)

    def claim(self, config: RunConfig, resume: bool) -> None:
        """Make the folder `config`'s. Raises UserError where it holds another run, or this one without `resume`."""
        if self.config_path.exists():
            other = differences(load_yaml(self.config_path), config)
            if other:
                raise UserError(f"{self.path}: holds another run ({other[0]}); give another --out")
            if not resume:
                raise UserError(f"{self.path}: holds this run unfinished; add --resume to go on, or give another --out")
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: is not an empty folder, nor one that holds a run; give another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_path, dump_yaml(config))

    def epochs(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(self.checkpoint_path.glob("epoch-*"))

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
        if latest is None:
            state = f"holds only damaged checkpoints ({self.damaged()[0]})" if self.damaged() else "holds no checkpoint yet"
            raise UserError(f"{self.path}: {state}")
        checkpoint = _open(self._folder(best_epoch(latest.history)))
        if checkpoint is None:
            raise UserError(f"{self._folder(best_epoch(latest.history))}: checkpoint missing or damaged")
        return replace(checkpoint, history=latest.history)

    def save(
        self, model: Mapping[str, Tensor], optimizers: Mapping[str, Any], history: History, fingerprint: str,
        spec: PictureSpec | None = None,
    ) -> None:  # fmt: skip
        """Write the checkpoint of the last epoch in `history`, then drop what need not be kept."""
        epoch = len(history)
        manifest = {"schema": SCHEMA, "epoch": epoch, "fingerprint": fingerprint, "history": history}
        if spec is not None:
            manifest["spec"] = asdict(spec)
        target, draft = self._folder(epoch), self.checkpoint_path / f".draft-{epoch:04d}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            _write(draft, model, optimizers, manifest)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own errors
            shutil.rmtree(draft, ignore_errors=True)
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{target}: checkpoint could not be written ({reason}); earlier checkpoints are whole") from None
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        self.write_metrics(history)
        self._prune(history)

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

    def _folder(self, epoch: int) -> Path:
        return self.checkpoint_path / f"epoch-{epoch:04d}"

    def _prune(self, history: History) -> None:
        kept = {self._folder(best_epoch(history)), *(self._folder(len(history) - back) for back in range(KEPT))}
        for folder in self.epochs():
            if folder not in kept:
                shutil.rmtree(folder)


def best_epoch(history: History) -> int:
    """The first epoch (from 1) of the last phase with the highest score on the held-out part."""
    rows = [row for row in range(len(history)) if history[row]["phase"] == history[-1]["phase"]]
    return 1 + max(rows, key=lambda row: (history[row]["score"], -row))


def read_spec(tree: Mapping[str, Any]) -> PictureSpec:
    """The inverse of `asdict`. Raises KeyError, TypeError or ValueError where `tree` is something else."""
    channels, height, width = (int(side) for side in tree["shape"])
    mean, std = (tuple(float(value) for value in tree[name]) for name in ("mean", "std"))
    if not len(mean) == len(std) == channels:
        raise ValueError(f"{channels} channels with {len(mean)} means and {len(std)} deviations")
    return PictureSpec(tuple(str(name) for name in tree["classes"]), (channels, height, width), mean, std)


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill `model` from a checkpoint. Raises UserError where it belongs to another model."""
    try:
        model.load_state_dict(checkpoint.model_state())
    except (RuntimeError, OSError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint.folder}: holds another model's weights ({first})") from None


def _write(draft: Path, model: Mapping[str, Tensor], optimizers: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    draft.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, draft / "model.safetensors")
    torch.save(dict(optimizers), draft / "optimizers.pt")
    sums = {path.name: _sha256(path) for path in sorted(draft.iterdir())}
    manifest = {**manifest, "sha256": sums}
    (draft / "manifest.json").write_text(json.dumps({**manifest, "seal": _seal(manifest)}))
    for path in draft.iterdir():
        sync(path)


def _open(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None where a file is missing or does not have its checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = manifest.pop("seal") == _seal(manifest)
        whole = whole and all(_sha256(folder / name) == digest for name, digest in manifest["sha256"].items())
        if manifest["schema"] == SCHEMA and whole:
            spec = read_spec(manifest["spec"]) if "spec" in manifest else None
            return Checkpoint(folder, manifest["epoch"], manifest["history"], manifest["fingerprint"], spec)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
