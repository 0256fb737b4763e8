"""A trained network for use: from a run's folder, from one file or from the hub, without the data that it was trained on."""

import functools
import json
import logging
from pathlib import Path

import safetensors.torch
import torch

from advmoe import hub
from advmoe.allocator import keep_freed_memory
from advmoe.config import RunConfig, RuntimeConfig
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import checked_record, read_record
from advmoe.files import drafted
from advmoe.models import Classifier
from advmoe.models.digest import weights_digest
from advmoe.runs.loaded import Loaded
from advmoe.training.checkpoint import Checkpoint
from advmoe.training.saved import KEY, Header, saved_file, saved_run

logger = logging.getLogger("advmoe")
_keep_freed_memory = functools.cache(keep_freed_memory)  # once in a process
FILE = "model.safetensors"


def load(what: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The network of a run's folder (its best epoch), of a file that `save_file` wrote, or of the hub (owner/name), on `device`.

    A run from before checkpoints knew their images needs its data once more. Raises UserError where there is no network.

    With glibc this also tells the process's allocator to keep freed memory (advmoe.allocator), unless MALLOC_* is set.
    """
    _keep_freed_memory()
    place = Path(what)
    if place.is_dir():
        file = place / FILE  # a folder as the hub holds it
        return (_from_file(file) if file.is_file() else _from_run(place)).to(device)
    if place.exists():
        return _from_file(place).to(device)
    if not hub.is_name(str(what)):
        raise UserError(f"{what}: no run's folder, no file, and no name on the hub (owner/name)")
    return from_pretrained(str(what), device)


def from_pretrained(name: str, device: str | torch.device = "cpu", revision: str | None = None) -> Loaded:
    """The network `name` (owner/name) of the Hugging Face hub. Raises UserError where it cannot be downloaded."""
    return _from_file(hub.fetch(name, FILE, revision)).to(device)


def save_file(model: Loaded, path: str | Path, *, images: bool = False) -> None:
    """Write one safetensors file that `load` reads anywhere: weights, and in its header configuration, classes and Record.

    The Record's gallery holds test images: it is left out unless `images` is true. A Record of other weights is left out, with a
    warning. Raises UserError if there is no folder for the file, and for a network that is not a `Loaded`.
    """
    if not isinstance(model, Loaded):
        raise UserError(
            f"save_file takes what advmoe.load gives, or advmoe.Loaded(network, config, spec), not {type(model).__name__}"
        )
    record = model.record
    if record is not None and model.weights_changed():
        logger.warning("%s: written without the Record, which is of the weights before they were changed", path)
        record = None
    header = Header(
        config=portable(model.config), spec=model.spec, epoch=model.epoch,
        record=None if record is None else (record if images else record.without_images()).to_json(),
    )  # fmt: skip
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{Path(path).parent}: no such folder for {Path(path).name}")
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    with drafted(Path(path)) as draft:
        safetensors.torch.save_file(state, draft, {"format": "pt", KEY: json.dumps(header.model_dump(by_alias=True))})


def portable(config: RunConfig) -> RunConfig:
    """A run's configuration without its folders and its machine's settings, which mean nothing elsewhere."""
    return config.replace(runtime=RuntimeConfig(), data=config.data.replace(data_dir=None, workers=None))


# A run's folder


def _from_run(run: Path) -> Loaded:
    saved, best = saved_run(run)
    return Loaded(*saved, _if_of(saved.network, _record(run, saved.config, best), run))


def _record(run: Path, config: RunConfig, best: Checkpoint) -> Record | None:
    """The run's Record; None where there is none, or it speaks of another epoch: the run went on after it was evaluated."""
    path = run / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    same = (record.epoch, record.fingerprint, record.seed) == (best.epoch, best.fingerprint, config.seed)
    return record if same else None


# One file


def _from_file(path: Path) -> Loaded:
    saved, content = saved_file(path)
    record = None if content is None else checked_record(content, str(path))
    return Loaded(*saved, _if_of(saved.network, record, path))


def _if_of(model: Classifier, record: Record | None, where: Path) -> Record | None:
    """The Record if it was measured on these weights, else None with a warning. Records of schemas 1 and 2 do not say."""
    if record is not None and record.weights not in (None, weights_digest(model)):
        logger.warning("%s: its Record is of other weights and is left out; evaluate the network again", where)
        return None
    return record
