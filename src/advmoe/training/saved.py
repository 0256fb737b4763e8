"""A trained network from a run's folder or from one file, with its configuration and the format of its images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from advmoe.config import RunConfig, RuntimeConfig, StoredConfig
from advmoe.data import ImageSpec, lookup_dataset
from advmoe.data.images import Spec
from advmoe.errors import UserError, lookup, nearest, one_line, reason_of, short_repr
from advmoe.files import JsonObject, check_plain
from advmoe.models import MODELS, Classifier, compact
from advmoe.training.checkpoint import MAX_FILE, Checkpoint, RunFolder
from advmoe.training.methods import METHODS, masked
from advmoe.training.start import network

SCHEMA = 2  # in schema 1 "image" was called "picture"
KEY = "advmoe"  # in the file's header
# the exceptions that invalid values raise
NO_NETWORK = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, RuntimeError)


class Header(BaseModel):
    """The header of a saved network's file. `record` is checked by `checked_record`."""

    version: int = Field(default=SCHEMA, alias="schema")
    config: StoredConfig
    spec: Spec
    epoch: int
    record: JsonObject | None


class Saved(NamedTuple):
    """A network in main memory, without masked channels. `epoch` is the best epoch of its run."""

    network: Classifier
    config: RunConfig
    spec: ImageSpec
    epoch: int


# A run's folder


HOW_TO_LOAD = "load the script that adds it (ADVMOE_EXTENSION=SCRIPT.py on the command line, import in Python)"


def saved_run(run: Path) -> tuple[Saved, Checkpoint]:
    """The network of a run's best epoch, and its checkpoint.

    For a run of an older version, whose checkpoints do not describe the images, the data is loaded. Raises UserError if there is
    no network.
    """
    folder = RunFolder(run)
    config, best = folder.config(), folder.best()
    spec = best.spec or spec_from_data(run, config)
    check_registered(config, run)
    try:
        state = best.model_state()
        _check_fit(config, spec, state)
        model = network(config.replace(runtime=RuntimeConfig()), spec)
        model.load_state_dict(state)
    except NO_NETWORK as error:
        raise UserError(f"{best.folder}: holds another model's weights ({reason_of(error)})") from None
    return Saved(compact(model), config, spec, best.epoch), best


def spec_from_data(run: Path, config: RunConfig) -> ImageSpec:
    """The format of a run's images, from its data. Raises UserError if the data cannot be read."""
    try:
        return lookup_dataset(config.data.dataset).spec(config.data)
    except UserError as error:
        raise UserError(f"{run}: its checkpoints do not describe its images, so its data is needed: {error}") from None


# One file


def saved_file(path: Path) -> tuple[Saved, JsonObject | None]:
    """The network in a file that `advmoe.save_file` wrote, and the JSON of its Record, if there is one. Raises UserError if the
    file holds no network."""
    state, header = _read(path)
    if KEY not in header:
        raise UserError(f"{path}: names no network in its header; give the folder of a run, or a file that advmoe.save_file wrote")
    try:
        content = json.loads(header[KEY])
        if content["schema"] not in (1, SCHEMA):
            raise UserError(f"{path}: is of schema {short_repr(content['schema'])}; this advmoe reads 1 to {SCHEMA}")
        parsed = Header.model_validate(content, context={"where": str(path)})
        check_registered(parsed.config, path)
        return _rebuilt(parsed, state), parsed.record
    except ValidationError as error:
        raise UserError(f"{path}: its header and weights make no network ({one_line(error, Header)})") from None
    except NO_NETWORK as error:
        raise UserError(f"{path}: its header and weights make no network ({reason_of(error, named=True)})") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file. The format contains no code that could run."""
    try:
        check_plain(path, MAX_FILE)
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
        return safetensors.torch.load_file(path), header
    except UserError:
        raise
    except Exception as error:  # a malicious header can raise nearly any exception
        raise UserError(f"{path}: not a safetensors file ({reason_of(error)})") from None


def check_loadable(config: RunConfig, spec: ImageSpec, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError if a file with these weights could not be loaded: its configuration describes another network."""
    try:
        _check_fit(_compacted(config), spec, state)
    except NO_NETWORK as error:
        raise UserError(f"{path}: could not be loaded again: the configuration describes another network ({error})") from None


def _rebuilt(header: Header, state: Mapping[str, Tensor]) -> Saved:
    config = _compacted(header.config)
    _check_fit(config, header.spec, state)
    model = network(config.replace(runtime=RuntimeConfig()), header.spec)
    model.load_state_dict(state)
    return Saved(model, header.config, header.spec, header.epoch)


def _compacted(config: RunConfig) -> RunConfig:
    """The configuration of the network without masked channels."""
    return config.replace(method="at_small_dense") if lookup(METHODS, config.method, "method").kind is masked else config


def check_registered(config: RunConfig, where: Path) -> None:
    """Raises UserError if the backbone or method of a trained network is one that its user added, and the script is not loaded
    here."""
    if config.model.backbone not in MODELS:
        raise UserError(f"{where}: its backbone '{config.model.backbone}' is not in advmoe.models.MODELS: {HOW_TO_LOAD}")
    if config.method not in METHODS:
        raise UserError(f"{where}: unknown method '{config.method}': {nearest(config.method, list(METHODS))}; or {HOW_TO_LOAD}")


def _check_fit(config: RunConfig, spec: ImageSpec, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError if `state` does not fit the network of the configuration.

    It allocates no memory for that network, because a small file can name a network of any size.
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in network(config, spec).state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    mismatch = next((name for name in (*expected, *shapes) if expected.get(name) != shapes.get(name)), None)
    if mismatch is None:
        return
    if mismatch not in shapes:
        raise ValueError(f"it has no tensor {mismatch}")
    if mismatch not in expected:
        raise ValueError(f"it has a tensor {mismatch} that the configuration does not describe")
    raise ValueError(f"{mismatch} is of shape {shapes[mismatch]}, not {expected[mismatch]}")
