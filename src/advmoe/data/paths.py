"""The data directory (`--data-dir`), and the names of the files and folders in it."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe.config import DataConfig
from advmoe.errors import UserError

UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, bytes that are not UTF-8, line separators


def data_path(config: DataConfig, forms: str) -> Path:
    """`data_dir` as a path. Raises UserError if it is not set or does not exist; `forms` says what it should contain."""
    if config.data_dir is None:
        raise UserError(f"{config.dataset} needs --data-dir: a path that contains {forms}")
    path = Path(config.data_dir)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return path


@contextmanager
def os_errors_as_user_errors(path: str | Path | None) -> Iterator[None]:
    """Turns an OSError (no permission, a broken disk) into a UserError that names the file, or `path` if the error has none."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def visible_entries(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def class_folders(paths: Iterable[Path]) -> dict[str, Path]:
    """Class name -> folder, sorted by name. Names are in Unicode's form NFC: file systems write the same name in several forms.

    Raises UserError, with the name escaped, if a name is not UTF-8 or has control characters, or if two names differ in
    their Unicode form only.
    """
    folders: dict[str, Path] = {}
    for path in paths:
        if any(unicodedata.category(character) in UNWRITABLE for character in path.name):
            raise UserError(f"{path}: the name of a class folder must be UTF-8 text without control characters; rename the folder")
        name = unicodedata.normalize("NFC", path.name)
        if name in folders:
            raise UserError(f"{path}: two folders have this class name, in different Unicode forms; merge them")
        folders[name] = path
    return dict(sorted(folders.items()))
