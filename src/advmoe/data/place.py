"""Where a data set lies: --data-dir, and what goes wrong with it in one line."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from advmoe.config import DataConfig
from advmoe.errors import UserError


def place_of(config: DataConfig, forms: str) -> Path:
    """`data_dir`. Raises UserError where there is none or nothing is there; `forms` says what should be."""
    if config.data_dir is None:
        raise UserError(f"{config.dataset} needs --data-dir: a place that holds {forms}")
    place = Path(config.data_dir)
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    return place


@contextmanager
def readable(config: DataConfig) -> Iterator[None]:
    """Turns an OSError (no permission, a broken disk) into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or config.data_dir}: cannot be read ({error.strerror or error})") from None


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raises UserError where a tar member points outside its archive, or is a link, a device or sparse."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: member {member.name} points outside the archive")
    if not (member.isdir() or member.isreg()) or member.issparse() or member.size < 0:
        raise UserError(f"{path}: member {member.name} is a link, a device or sparse, not a plain file")
