"""CIFAR from the Hugging Face hub, as Parquet files, by the library `datasets` (extra `hub`)."""

from importlib import import_module
from pathlib import Path
from typing import Any

from advmoe.errors import UserError, reason_of
from advmoe.files import drafted

REPOSITORIES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def fetch_from_hub(name: str, folder: Path) -> list[str]:
    """Write train.parquet and test.parquet of the data set `name`, with the hub's columns, into `folder`; existing files are kept.

    Returns lines that say what was done. Raises UserError if the data set is not offered, or the library is missing or fails.
    """
    if name not in REPOSITORIES:
        raise UserError(f"{name} is not downloaded from the hub; --from hub has {' and '.join(REPOSITORIES)}")
    paths = {split: folder / f"{split}.parquet" for split in ("train", "test")}
    missing = [split for split in paths if not paths[split].exists()]
    for split in missing:
        _write(_library(), REPOSITORIES[name], split, paths[split])
    return [f"{path}: {'downloaded' if split in missing else 'already exists'}" for split, path in paths.items()]


def _write(datasets: Any, repository: str, split: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = datasets.load_dataset(repository, split=split)
        with drafted(path) as draft:
            rows.to_parquet(str(draft))
    except Exception as error:  # the library uses many others, and raises their exceptions
        if isinstance(error, OSError) and error.filename is not None:
            raise  # an error of the disk, not of the hub
        raise UserError(f"cannot read {repository} from the hub ({reason_of(error, named=True)})") from None


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise UserError("--from hub needs the library datasets: pip install 'advmoe[hub]'") from None
