"""CIFAR from the Hugging Face hub, through the library `datasets` (extra `hub`), as Parquet that our readers take."""

from importlib import import_module
from pathlib import Path
from typing import Any

from advmoe.errors import UserError
from advmoe.files import drafted

REPOSITORIES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def fetch_from_hub(name: str, to: Path) -> list[str]:
    """Write train.parquet and test.parquet (their columns as on the hub) of the data set `name` into `to`, unless they are there.

    Gives lines that say what was done. Raises UserError where the set is not offered, the library is missing, or fails.
    """
    if name not in REPOSITORIES:
        raise UserError(f"{name} is not read from the hub; --from hub has {' and '.join(REPOSITORIES)}")
    paths = {part: to / f"{part}.parquet" for part in ("train", "test")}
    missing = [part for part in paths if not paths[part].exists()]
    for part in missing:
        _write(_library(), REPOSITORIES[name], part, paths[part])
    return [f"{path}: {'fetched' if part in missing else 'already there'}" for part, path in paths.items()]


def _write(datasets: Any, repository: str, part: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = datasets.load_dataset(repository, split=part)
        with drafted(path) as draft:
            rows.to_parquet(str(draft))
    except Exception as error:  # the library stands on many others, and raises theirs
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the disk, not of the hub
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot read {repository} from the hub ({reason})") from None


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise UserError("--from hub needs the library datasets: pip install 'advmoe[hub]'") from None
