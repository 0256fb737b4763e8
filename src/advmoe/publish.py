"""Publish a network on the Hugging Face hub: its file, its configuration, its Record, and a model card."""

import re
import tempfile
from pathlib import Path

from advmoe import hub
from advmoe.config import dump_yaml
from advmoe.errors import UserError
from advmoe.files import write_atomically, write_json
from advmoe.reports.model_card import model_card
from advmoe.runs.load import FILE, load, portable, save_file, shared
from advmoe.runs.loaded import Loaded

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,63}")


def push_to_hub(run: str | Path, name: str, *, license: str | None = None, private: bool = False, images: bool = False) -> str:
    """Publish an evaluated network (whatever `load` takes) as `name` (owner/name) on the hub; return its address.

    The repository contains model.safetensors, config.yaml, record.json and a model card (README.md) written from the Record.
    `license` is the hub's identifier of a licence, such as "mit"; without it the card names none. The Record's test images are
    published only if `images` is true. A repository that does not exist is created, as a private one if `private` is true. Raises
    UserError if there is no Record, if the hub refuses, or if `private` is true and the repository is public.
    """
    model = load(run)
    if model.record is None:
        raise UserError(f"{run}: has no Record of its best epoch, so its robust accuracy is unknown; run advmoe evaluate {run}")
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(model, Path(folder), name, license=license, images=images)
        return hub.publish(Path(folder), name, private)


def write_hub_folder(
    model: Loaded, folder: Path, name: str, *, license: str | None = None, images: bool = False, half: bool = False
) -> None:
    """Write the files of a repository on the hub: model.safetensors, config.yaml, record.json and README.md, the model card.

    The model must have a Record. Raises UserError, before `folder` is created, if `name` is not owner/name or `license` is no
    identifier.
    """
    if not hub.is_name(name):
        raise UserError(f"'{name}' is not a name on the hub: it must be owner/name")
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f"license must be an identifier of the hub, such as mit, apache-2.0 or other, not '{license}'")
    assert model.record is not None
    record = shared(model.record, images)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model, folder / FILE, images=images, half=half)
    write_atomically(folder / "config.yaml", dump_yaml(portable(model.config)))
    write_json(folder / "record.json", record.to_json(), indent=1)
    write_atomically(folder / "README.md", model_card(record, name, model.classes, model.input_size, license))
