"""Downloads of data sets from their official addresses: resumed, verified, and renamed only when they are correct."""

import hashlib
import http.client
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from advmoe.data.archive import open_zip, read_entry
from advmoe.errors import UserError, lookup, reason_of
from advmoe.files import write_atomically
from advmoe.locks import locked

TIMEOUT = 30.0  # seconds to wait for an answer
ATTEMPTS = 5  # connections for one file, if each of them receives something
CHUNK = 2**18
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Official:
    """An archive at its official address, which is read as it is; `folder` is what it unpacks to, if that is read too."""

    url: str
    md5: str | None = None  # as published
    folder: str | None = None

    @property
    def file(self) -> str:
        """The file name of the archive."""
        return self.url.rpartition("/")[2]


OFFICIAL = {
    "cifar10": Official("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": Official("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "tinyimagenet": Official("http://cs231n.stanford.edu/tiny-imagenet-200.zip", folder="tiny-imagenet-200"),
}
NOT_DOWNLOADED = {
    "imagenet": "cannot be downloaded without an account: register at https://image-net.org, download ILSVRC2012_img_train.tar, "
    "_img_val.tar and the development kit (it has the classes of val), and put the images in DIR/train/WNID/ and DIR/val/WNID/",
    "fashion-mnist": "comes with the package, there is nothing to download",
    "folder": "is a folder of your images; there is nothing to download",
}


class _Interrupted(Exception):
    """The connection ended early or was refused; the message says why."""


def fetch(name: str, folder: Path, console: Console) -> list[str]:
    """Download the data set `name` into `folder` and verify it; a file that exists is verified, not downloaded again.

    Returns lines that say what was done. If no checksum is published, the SHA-256 of the first download is stored beside the
    archive, and later ones are compared with it. Raises UserError if there is no network (the received part is kept, and the
    next call continues from there), if another process is downloading the file, or if a file has the wrong checksum: a downloaded
    one is then renamed to end in .bad.
    """
    if name in NOT_DOWNLOADED:
        raise UserError(f"{name} {NOT_DOWNLOADED[name]}")
    official = lookup(OFFICIAL, name, "dataset to download")
    path, part = folder / official.file, folder / f"{official.file}.part"
    if not path.exists() and official.folder is not None and (folder / official.folder).is_dir():
        return [f"{folder / official.folder}: already exists, and there is no archive to compare it with"]
    expected = official.md5 or _recorded_checksum(_checksum_file(official, folder))
    if path.exists():
        return [_accept(path, official, folder, expected)]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{official.file}.lock", path, "downloading this file; wait for it to finish"):
        _download(official.url, part, path, console)
        try:
            line = _accept(part, official, folder, expected)
        except UserError as error:
            bad = part.replace(path.with_name(f"{path.name}.bad"))
            raise UserError(f"{error}; {official.url} is saved as {bad}; the same command downloads it again") from None
        part.replace(path)
    return [f"{path}: downloaded", line]


# Verification


def _accept(archive: Path, official: Official, folder: Path, expected: str | None) -> str:
    """Verify the archive and return a line about it. Raises UserError if the checksum is wrong, or if a zip without one is bad."""
    algorithm = "sha256" if official.md5 is None else "md5"
    with archive.open("rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if expected not in (None, checksum):
        raise UserError(f"{archive}: is not the official {official.file}: {algorithm.upper()} {checksum}, expected {expected}")
    source = "as published" if official.md5 else "as recorded at first use" if expected else "recorded now: none is published"
    if expected is None:
        _check_zip(archive)
        write_atomically(_checksum_file(official, folder), f"{checksum}  {official.file}\n")  # as sha256sum -c reads it
    return f"{official.file}: {algorithm.upper()} {checksum}, {source}"


def _check_zip(path: Path) -> None:
    """Read every file of a zip. Raises UserError, which names the file, if one is damaged."""
    with open_zip(path) as archive:
        for name in archive.namelist():
            read_entry(archive, name, f"{path}/{name}")


def _checksum_file(official: Official, folder: Path) -> Path:
    return folder / f"{official.file}.sha256"


def _recorded_checksum(path: Path) -> str | None:
    """The checksum stored at first use, if any."""
    if not path.exists():
        return None
    words = path.read_text(errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise UserError(f"{path}: contains no SHA-256; remove the file, and the checksum of the archive is recorded again")
    return words[0]


# The download


def _download(url: str, part: Path, path: Path, console: Console) -> None:
    """Download `url` into `part`, continuing from its end. Raises UserError, which says what to do without a network."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=None)
        for attempt in range(1, ATTEMPTS + 1):
            before = _size(part)
            try:
                return _connect(url, part, progress, task)
            except _Interrupted as error:
                reason = str(error)
            if attempt == ATTEMPTS or _size(part) <= before:
                break
    hint = f"; {_size(part)} bytes are kept, the same command continues from there" if _size(part) else ""
    raise UserError(f"cannot download {url} ({reason}): download it by other means and save it as {path}{hint}")


def _connect(url: str, part: Path, progress: Progress, task: TaskID) -> None:
    """One connection. Raises _Interrupted if the file is not complete after it."""
    start = _size(part)
    headers = {"User-Agent": "advmoe"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            _receive(response, part, start, progress, task)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from None
        if error.headers.get("Content-Range") != f"bytes */{start}":  # equal: nothing is missing
            part.unlink()
            _connect(url, part, progress, task)
    except NETWORK as error:
        raise _Interrupted(reason_of(error.reason if isinstance(error, urllib.error.URLError) else error)) from None


def _receive(response: http.client.HTTPResponse, part: Path, start: int, progress: Progress, task: TaskID) -> None:
    """Append the answer to `part`, or start again if the server sends the complete file although a range was requested."""
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if resumed and (first is None or int(first[1]) != start):
        raise _Interrupted("the server sent another range than requested")
    done = start if resumed else 0
    length = response.headers.get("Content-Length")
    total = None if length is None else done + int(length)
    progress.update(task, completed=done, total=total)
    with part.open("ab" if resumed else "wb") as file:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            done += len(chunk)
            progress.update(task, completed=done)
    if total is not None and done < total:
        raise _Interrupted(f"connection lost after {done} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
