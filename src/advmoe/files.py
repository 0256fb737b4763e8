"""Reading and writing files. A file is replaced at once: it is the old or the new one at any moment, never half written."""

import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from advmoe.errors import UserError

logger = logging.getLogger("advmoe")

JsonObject = dict[str, Any]  # the content of a file; its reader checks the values
OF_RUN = ("config.yaml", "metrics.jsonl", "*record.json", "*gallery.json", "model.safetensors")
FOLDERS_OF_RUN = ("checkpoints", "evaluation", "evaluation-*")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A new temporary file beside `path`. It replaces `path`, or the file that a link there leads to, if the block succeeds;
    otherwise it is removed.

    Its name is random: processes of several machines or containers that share the folder may have the same number.
    """
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")
    try:
        yield draft
        sync(draft)
        draft.replace(target)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(draft):
            error.filename = str(path)  # the name that the user knows
        raise


def check_target(path: Path, what: str, *inputs: Path) -> None:
    """Raises UserError if a file that will be written is a folder, a pipe or a device, if its folder does not exist or is
    read-only, or if it could replace one of the `inputs` or, where that is the folder of a run, a file of the run.

    `what` is in the message.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; {what} must go to a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a pipe or a device; {what} must go to a file")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder for {what}")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{path.parent}: {what} cannot be written to this folder")
    for given in inputs:
        within = Path(os.path.relpath(target, os.path.realpath(given))).parts  # () for the input itself
        names = FOLDERS_OF_RUN if len(within) > 1 else OF_RUN
        if not within or any(fnmatch(within[0], name) for name in names):
            raise UserError(f"{path}: {what} could replace {'a file of ' * bool(within)}{given}; give another name")


def check_folder(folder: Path, what: str) -> None:
    """Raises UserError if a folder is read-only, or if it does not exist and cannot be created. `what` is in the message."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing}: {what} cannot be written to this folder")


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk` from the top down, in the order of the folders' names, also through links to folders. Each folder comes once,
    and one that cannot be read is left out with a warning."""
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=_warn_unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield parent, folders, names


def _warn_unreadable(error: OSError) -> None:
    logger.warning("left out, %s: cannot be read (%s)", error.filename, error.strerror or error)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


def bounded_text(path: Path, limit: int) -> str:
    """The text of a file in UTF-8. Raises OSError, UnicodeDecodeError, and UserError as `check_plain` does."""
    check_plain(path, limit)
    return path.read_text(encoding="utf-8")


def json_object(path: Path) -> JsonObject | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        return parsed_object(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def parsed_object(text: str) -> JsonObject | None:
    """The JSON object in a text; None if it holds anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_plain(path: Path, limit: int) -> None:
    """Raises OSError if there is no file, and UserError if it is a pipe or a device, or has more than `limit` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # reading a folder raises another error
        raise UserError(f"{path}: not a plain file")
    if status.st_size > limit:
        raise UserError(f"{path}: has {status.st_size:,} bytes; at most {limit:,} are read")


def check_utf8(path: Path) -> None:
    """Raises UserError if a path to be written has bytes that are not UTF-8: libraries that read the file later refuse it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the path must be UTF-8 text; give another name") from None


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
