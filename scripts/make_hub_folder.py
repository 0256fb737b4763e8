"""Build the folder to upload to the Hugging Face hub from a network of the package, a run or a file, and check it.

    python scripts/make_hub_folder.py NETWORK OWNER/NAME FOLDER [LICENSE]
    hf upload OWNER/NAME FOLDER

Nothing is uploaded. The card is read by the hub's library (extra hub), and the network is loaded from the folder.
"""

import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from advmoe.errors import UserError, reason_of
from advmoe.models.digest import weights_digest
from advmoe.publish import write_hub_folder
from advmoe.runs.load import load


def build(network: str, name: str, folder: Path, license: str | None = None) -> None:
    """Write and check the folder. Raises UserError if the network was not evaluated, if the hub's library refuses the name or the
    card, if the name is not owner/name, if the licence is no identifier of the hub, or if the folder is not empty."""
    model = load(network)
    if model.record is None:
        raise UserError(f"{network}: has no Record: advmoe evaluate {network}")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"{name}: the hub's library refuses it ({reason_of(error)})") from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not an empty folder")
    floats = [tensor for tensor in model.network.state_dict().values() if tensor.is_floating_point()]
    half = all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in floats)
    write_hub_folder(model, folder, name, license=license, half=half)
    if not ModelCard.load(folder / "README.md").data.eval_results:
        raise UserError(f"{folder}: the hub's library reads no figures in its card")
    if weights_digest(load(folder).network) != model.record.weights:
        raise UserError(f"{folder}: the network in it is not the one of the Record")


def main(network: str, name: str, folder: str, license: str | None = None) -> None:
    """Build the folder, and print the command that uploads it."""
    build(network, name, Path(folder), license)
    print(f"{folder}: {', '.join(sorted(path.name for path in Path(folder).iterdir()))}\nnext: hf upload {name} {folder}")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
