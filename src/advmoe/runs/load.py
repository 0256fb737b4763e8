"""A trained network for use: from a run's folder, one file, the package or the hub, without the data that it was trained on."""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from advmoe import hub, networks
from advmoe.allocator import keep_freed_memory
from advmoe.config import RunConfig, RuntimeConfig, StoredConfig
from advmoe.data import DATASETS, ImageSpec
from advmoe.errors import UserError, lookup, one_line, shown
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import RECORD, checked_record, read_record
from advmoe.files import JsonObject, check_plain, drafted
from advmoe.models import Classifier, compact
from advmoe.models.digest import weights_digest
from advmoe.runs.loaded import Loaded
from advmoe.training.checkpoint import MAX_FILE, Checkpoint, RunFolder, load_weights
from advmoe.training.manifest import Spec
from advmoe.training.methods import METHODS, masked
from advmoe.training.start import network

logger = logging.getLogger("advmoe")
_keep_freed_memory = functools.cache(keep_freed_memory)  # once in a process
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


class Header(BaseModel):
    """What a saved network's header says beside the weights. `record` is checked by `checked_record`."""

    version: int = Field(default=SCHEMA, alias="schema")
    config: StoredConfig
    spec: Spec
    epoch: int
    record: JsonObject | None


def load(what: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The network of a run's folder (its best epoch), of a file that `save_file` wrote, of the package (`advmoe models` lists their
    names), or of the hub (owner/name), on `device`.

    A run whose checkpoints do not describe its images (older versions) needs its data again. Raises UserError if there is no
    network.

    With glibc this also tells the process's allocator to keep freed memory (advmoe.allocator), unless MALLOC_* is set.
    """
    _keep_freed_memory()
    path = Path(what)
    if path.is_dir():
        file = path / FILE  # a folder as the hub holds it
        return (_from_file(file) if file.is_file() else _from_run(path)).to(device)
    if path.exists():
        return _from_file(path).to(device)
    packaged = networks.find(str(what))
    if packaged is not None:
        return _from_file(packaged).to(device)
    if not hub.is_name(str(what)):
        known = networks.in_words()
        raise UserError(
            f"{what}: no run's folder, no file, no name on the hub (owner/name), and no network of the package ({known})"
        )
    return from_pretrained(str(what), device)


def from_pretrained(name: str, device: str | torch.device = "cpu", revision: str | None = None) -> Loaded:
    """The network `name` (owner/name) of the Hugging Face hub. Raises UserError if it cannot be downloaded."""
    return _from_file(hub.fetch(name, FILE, revision)).to(device)


def save_file(model: Loaded, path: str | Path, *, images: bool = False, half: bool = False) -> None:
    """Write one safetensors file that `load` reads anywhere: weights, and in its header configuration, classes and Record.

    The Record's gallery holds test images: it is left out unless `images` is true. With `half`, the weights are rounded to float16,
    which halves the file; `load` gives a float32 network of the rounded weights. A Record of other weights is left out, with a
    warning. Raises UserError if there is no folder for the file, for a network that is not a `Loaded`, and with `half` for weights
    beyond float16's range.
    """
    if not isinstance(model, Loaded):
        raise UserError(
            f"save_file takes what advmoe.load gives, or advmoe.Loaded(network, config, spec), not {type(model).__name__}"
        )
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    written = _in_half(state) if half else state
    exact = all(torch.equal(tensor, written[name].to(tensor)) for name, tensor in state.items())
    record = model.record
    if record is not None and (model.weights_changed() or not exact):
        logger.warning("%s: written without the Record, which is of the weights before they were changed", path)
        record = None
    header = Header(
        config=portable(model.config), spec=model.spec, epoch=model.epoch,
        record=None if record is None else (record if images else record.without_images()).to_json(),
    )  # fmt: skip
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{Path(path).parent}: no such folder for {Path(path).name}")
    with drafted(Path(path)) as draft:
        safetensors.torch.save_file(written, draft, {"format": "pt", KEY: json.dumps(header.model_dump(by_alias=True))})


def _in_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with floats in float16. Raises UserError if one is beyond its range."""
    rounded = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    beyond = next((name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()), None)
    if beyond is not None:
        raise UserError(f"{beyond}: has values beyond float16's range; write the file without half=True")
    return rounded


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
    compacted = compact(model)
    return Loaded(compacted, config, spec, best.epoch, _if_measured_on(compacted, _record(run, config, best), run))


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
        return _rebuilt(Header.model_validate(content, context={"where": str(path)}), state, path)
    except ValidationError as error:
        raise UserError(f"{path}: its header and weights make no network ({one_line(error, Header)})") from None
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


def _rebuilt(header: Header, state: Mapping[str, Tensor], path: Path) -> Loaded:
    config = header.config
    record = _record_of_file(header, path)
    kind = lookup(METHODS, config.method, "method").kind
    compacted = config.replace(method="at_small_dense") if kind is masked else config  # what is kept of masks is as wide
    _check_fit(compacted, header.spec, state)
    model = network(compacted, header.spec)
    model.load_state_dict(state)
    return Loaded(model, config, header.spec, header.epoch, _if_measured_on(model, record, path))


def _record_of_file(header: Header, path: Path) -> Record | None:
    """The Record that `advmoe evaluate` wrote beside the file, else the one in its header; None without either."""
    beside = path.with_name(f"{path.stem}.{RECORD}")
    if beside.is_file():
        return read_record(beside)
    return None if header.record is None else checked_record(header.record, str(path))


def _if_measured_on(model: Classifier, record: Record | None, where: Path) -> Record | None:
    """The Record if it was measured on these weights, else None with a warning. Records of schemas 1 and 2 do not say."""
    if record is not None and record.weights not in (None, weights_digest(model)):
        logger.warning("%s: its Record is of other weights and is left out; evaluate the network again", where)
        return None
    return record


def _check_fit(config: RunConfig, spec: ImageSpec, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where `state` is not of the network that the configuration names, before memory is taken for one: a small
    file can name a network of any size."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in network(config, spec).state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    mismatch = next((name for name in (*wanted, *given) if wanted.get(name) != given.get(name)), None)
    if mismatch is not None:
        raise ValueError(f"{mismatch} is of shape {given.get(mismatch)}, not {wanted.get(mismatch)}")
