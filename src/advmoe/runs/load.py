"""A trained network for use: from a run's folder, from one file or from the hub, without the data that it was trained on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from advmoe import hub
from advmoe.allocator import keep_freed_memory
from advmoe.attacks import Norm
from advmoe.config import RunConfig, RuntimeConfig, from_dict, to_dict
from advmoe.data import DATASETS, ImageSpec
from advmoe.errors import UserError, lookup, shown
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import checked_record, read_record
from advmoe.files import check_plain, drafted
from advmoe.models import Classifier, compact
from advmoe.moe import HARD, Gate, Routings
from advmoe.training.checkpoint import MAX_FILE, Checkpoint, RunFolder, load_weights, read_spec
from advmoe.training.methods import METHODS, masked
from advmoe.training.start import network

SCHEMA = 2  # 1 said "picture" where 2 says "image"
FILE = "model.safetensors"
KEY = "advmoe"  # in the file's header
NO_NETWORK = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    RuntimeError,
)  # of values that fit nothing


class ThreatModel(NamedTuple):
    """The ball that a network was trained to withstand; `epsilon` in pixels of [0, 1]."""

    norm: Norm
    epsilon: float


class Loaded(nn.Module):
    """A trained network in eval mode: pixels [B, C, H, W] in [0, 1] -> logits [B, classes].

    `classes` are the names of its outputs, `input_size` is (C, H, W), `threat_model` the ball that it was trained for, `record` the
    Record of this very epoch or None where it was not evaluated, `config` the run's configuration, `epoch` the run's best.
    """

    def __init__(self, network: Classifier, config: RunConfig, spec: ImageSpec, epoch: int, record: Record | None) -> None:
        super().__init__()
        self.network = network
        self.config, self.spec, self.epoch, self.record = config, spec, epoch, record
        self.classes, self.input_size = spec.classes, spec.shape
        self.threat_model = ThreatModel("Linf", config.attack.epsilon)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes], through the hard gate."""
        logits: Tensor = self.network(x)
        return logits

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and one Routing for each choice, as `Classifier.forward_routed` gives them."""
        return self.network.forward_routed(x, gate)


def load(what: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The network of a run's folder (its best epoch), of a file that `save_file` wrote, or of the hub (owner/name), on `device`.

    A run from before checkpoints knew their images needs its data once more. Raises UserError where there is no network.

    With glibc this also tells the process's allocator to keep freed memory (advmoe.allocator), unless MALLOC_* is set.
    """
    keep_freed_memory()
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
    """The network `name` (owner/name) of the Hugging Face hub. Raises UserError where it is not to be had."""
    return _from_file(hub.fetch(name, FILE, revision)).to(device)


def save_file(model: Loaded, path: str | Path, *, images: bool = False) -> None:
    """Write one safetensors file that `load` reads anywhere: weights, and in its header configuration, classes and Record.

    The Record's gallery holds test images: it is left out unless `images` is true. Raises UserError where there is no folder for
    the file.
    """
    content = {
        "schema": SCHEMA, "config": to_dict(portable(model.config)), "spec": asdict(model.spec), "epoch": model.epoch,
        "record": None if model.record is None else (model.record if images else model.record.without_images()).to_json(),
    }  # fmt: skip
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{Path(path).parent}: no such folder for {Path(path).name}")
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    with drafted(Path(path)) as draft:
        safetensors.torch.save_file(state, draft, {"format": "pt", KEY: json.dumps(content)})


def portable(config: RunConfig) -> RunConfig:
    """A run's configuration without its folders and its machine's settings, which mean nothing elsewhere."""
    return config.replace(runtime=RuntimeConfig(), data=config.data.replace(data_dir=None, workers=None))


# A run's folder


def _from_run(run: Path) -> Loaded:
    folder = RunFolder(run)
    config, best = folder.config(), folder.best()
    spec = best.spec or _spec_from_data(run, config)
    try:
        _check_fit(config, spec, best.model_state())
    except NO_NETWORK as error:
        raise UserError(f"{best.folder}: holds another model's weights ({' '.join(str(error).split())[:200]})") from None
    model = network(config.replace(runtime=RuntimeConfig()), spec)
    load_weights(model, best)
    return Loaded(compact(model), config, spec, best.epoch, _record(run, config, best))


def _spec_from_data(run: Path, config: RunConfig) -> ImageSpec:
    try:
        return lookup(DATASETS, config.data.dataset, "dataset").spec(config.data)
    except UserError as error:
        raise UserError(f"{run}: its checkpoints do not say what its images are, and its data is needed: {error}") from None


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
    state, header = _read(path)
    if KEY not in header:
        raise UserError(f"{path}: names no network in its header; give the folder of a run, or a file that advmoe.save_file wrote")
    try:
        content = json.loads(header[KEY])
        if content["schema"] not in (1, SCHEMA):
            raise UserError(f"{path}: is of schema {shown(content['schema'])}; this advmoe reads 1 to {SCHEMA}")
        return _rebuilt(content, state, path)
    except NO_NETWORK as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: its header and weights make no network ({reason})") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. No code in it can run: the format has none."""
    try:
        check_plain(path, MAX_FILE)
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
        return safetensors.torch.load_file(path), header
    except UserError:
        raise
    except Exception as error:  # a hostile header raises nearly anything
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:120]})") from None


def _rebuilt(content: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> Loaded:
    config, spec = from_dict(content["config"], str(path)), read_spec(content["spec"])
    record = None if content["record"] is None else checked_record(content["record"], str(path))
    kind = lookup(METHODS, config.method, "method").kind
    compacted = config.replace(method="at_small_dense") if kind is masked else config  # what is kept of masks is as wide
    _check_fit(compacted, spec, state)
    model = network(compacted, spec)
    model.load_state_dict(state)
    return Loaded(model, config, spec, index(content["epoch"]), record)


def _check_fit(config: RunConfig, spec: ImageSpec, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where `state` is not of the network that the configuration names, before memory is taken for one: a small
    file can name a network of any size."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in network(config, spec).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    odd = next((name for name in (*wanted, *found) if wanted.get(name) != found.get(name)), None)
    if odd is not None:
        raise ValueError(f"{odd} is of shape {found.get(odd)}, not {wanted.get(odd)}")
