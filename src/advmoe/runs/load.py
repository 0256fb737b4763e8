"""A trained network for use: from a run's folder, one file, the package or the hub, without the data that it was trained on."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from advmoe import hub, networks
from advmoe.config import RunConfig, RuntimeConfig, from_dict, to_dict
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_config import RecordedConfig
from advmoe.evaluation.record_file import RECORD, checked_record, read_record
from advmoe.files import JsonObject, check_target, drafted
from advmoe.libraries import tune_libraries
from advmoe.models import Classifier
from advmoe.models.digest import weights_digest
from advmoe.moe.copies import with_plain_weights
from advmoe.runs.loaded import Loaded
from advmoe.training.saved import KEY, Header, check_loadable, saved_file, saved_run

logger = logging.getLogger("advmoe")
FILE = "model.safetensors"


def load(what: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The network of a run's folder (its best epoch), of a file that `save_file` wrote, of the package (`advmoe models` lists their
    names), or of the hub (owner/name, if there is no folder `owner` here), on `device`.

    A run whose checkpoints do not describe its images (older versions) needs its data again. Raises UserError if there is no
    network.

    The first call in a process also changes settings of glibc and oneDNN that the user has not set (advmoe.libraries).
    """
    tune_libraries()
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
    if path.parent.is_dir():
        raise UserError(
            f"{what}: no such run or file (a name on the hub, owner/name, is looked up only if there is no folder {path.parent})"
        )
    return from_pretrained(str(what), device)


def from_pretrained(name: str, device: str | torch.device = "cpu", revision: str | None = None) -> Loaded:
    """The network `name` (owner/name) of the Hugging Face hub. Raises UserError if it cannot be downloaded."""
    return _from_file(hub.fetch(name, FILE, revision)).to(device)


def save_file(model: Loaded, path: str | Path, *, images: bool = False, half: bool = False) -> None:
    """Write one safetensors file that `load` reads anywhere: weights, and in its header configuration, classes and Record.

    The Record's gallery holds test images: it is left out unless `images` is true. With `half`, the weights are rounded to float16,
    which halves the file; `load` gives a float32 network of the rounded weights. Weights that pruning or a parametrization computes
    are written as plain weights. A Record of other weights is left out, with a warning. Raises UserError if there is no folder for
    the file, for a network that is not a `Loaded` or not the one that its configuration describes, and with `half` for weights
    beyond float16's range.
    """
    if not isinstance(model, Loaded):
        raise UserError(
            f"save_file takes what advmoe.load gives, or advmoe.Loaded(network, config, spec), not {type(model).__name__}"
        )
    network = with_plain_weights(model.network)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    written = _in_half(state) if half else state
    exact = all(torch.equal(tensor, written[name].to(tensor)) for name, tensor in state.items())
    record = model.record
    if record is not None and (model.weights_changed() or not exact):
        logger.warning("%s: written without the Record, which is of the weights before they were changed", path)
        record = None
    check_loadable(model.config, model.spec, state, Path(path))
    header = Header(
        config=portable(model.config), spec=model.spec, epoch=model.epoch,
        record=None if record is None else shared(record, images).to_json(),
    )  # fmt: skip
    check_target(Path(path), Path(path).name)
    with drafted(Path(path)) as draft:
        # its save_file makes a file that only its owner can read
        draft.write_bytes(safetensors.torch.save(written, {"format": "pt", KEY: json.dumps(header.model_dump(by_alias=True))}))


def _in_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with floats in float16. Raises UserError if one is beyond its range."""
    rounded = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    beyond = next((name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()), None)
    if beyond is not None:
        raise UserError(f"{beyond}: has values beyond float16's range; write the file without half=True")
    return rounded


def portable(config: RunConfig) -> RunConfig:
    """A run's configuration without its folders and its machine's settings, which mean nothing elsewhere. Of the files that it
    learned from, the names are kept."""
    config = config.replace(runtime=RuntimeConfig(), data=config.data.replace(data_dir=None, workers=None))
    return from_dict(_without_folders(to_dict(config)))


def shared(record: Record, images: bool) -> Record:
    """A Record to be shared: without the folders of the files that the run learned from, and without its gallery unless `images`
    is true."""
    config = RecordedConfig.model_validate(_without_folders(record.config.model_dump()))
    teacher = record.teacher and record.teacher.model_copy(update={"path": Path(record.teacher.path).name})
    record = record.model_copy(update={"config": config, "teacher": teacher})
    return record if images else record.without_images()


def _without_folders(tree: JsonObject) -> JsonObject:
    """The tree of a configuration with the last part of each path in it."""
    for section, name in (("training", "teacher"), ("training", "init_from"), ("data", "generated")):
        fields = tree.get(section)
        if isinstance(fields, Mapping) and isinstance(fields.get(name), str):
            tree = {**tree, section: {**fields, name: Path(fields[name]).name}}
    return tree


# A run's folder


def _from_run(run: Path) -> Loaded:
    saved, best = saved_run(run)
    record = _readable(run / "record.json")
    if record and (record.epoch, record.fingerprint, record.seed) != (best.epoch, best.fingerprint, saved.config.seed):
        record = None  # the run was continued after its evaluation
    return Loaded(*saved, record and _if_measured_on(saved.network, record, run))


# One file


def _from_file(path: Path) -> Loaded:
    saved, content = saved_file(path)
    written = _readable(path.with_name(f"{path.stem}.{RECORD}"))  # by `advmoe evaluate`, beside the file
    record = written and _if_measured_on(saved.network, written, path)
    if record is None and content is not None:
        record = _if_measured_on(saved.network, checked_record(content, str(path)), path)
    return Loaded(*saved, record)


def _readable(path: Path) -> Record | None:
    """The Record in a file; None without the file, and with a warning if it is damaged: the network can be used without it."""
    if not path.is_file():
        return None
    try:
        return read_record(path)
    except UserError as error:
        logger.warning("%s; the network is loaded without this Record", error)
        return None


def _if_measured_on(model: Classifier, record: Record, where: Path) -> Record | None:
    """The Record if it was measured on these weights, else None with a warning. Records of schemas 1 and 2 do not say."""
    if record.weights not in (None, weights_digest(model)):
        logger.warning("%s: its Record is of other weights and is left out; evaluate the network again", where)
        return None
    return record
