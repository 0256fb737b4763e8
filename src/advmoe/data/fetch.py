"""Data sets from their official addresses: fetched, resumed, verified, and never wrong under the right name."""

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

from advmoe.data.archive import unpack
from advmoe.errors import UserError, lookup
from advmoe.files import write_atomically

TIMEOUT = 30.0  # seconds without an answer
ATTEMPTS = 5  # connections for one file, as long as each brings something
CHUNK = 2**18
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Official:
    """An archive at its address; `folder` is what it is unpacked to, where the reader does not take it as it is."""

    url: str
    md5: str | None = None  # as published
    folder: str | None = None

    @property
    def file(self) -> str:
        """The archive's name."""
        return self.url.rpartition("/")[2]


OFFICIAL = {
    "cifar10": Official("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": Official("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "tinyimagenet": Official("http://cs231n.stanford.edu/tiny-imagenet-200.zip", folder="tiny-imagenet-200"),
}
NOT_FETCHED = {
    "imagenet": "cannot be fetched freely: register at https://image-net.org, fetch ILSVRC2012_img_train.tar, _img_val.tar "
    "and the development kit (it has the classes of val), and put the images at DIR/train/WNID/ and DIR/val/WNID/",
    "fashion-mnist": "is embedded, there is nothing to fetch",
    "folder": "is a folder of your own images, there is nothing to fetch",
}


class _Interrupted(Exception):
    """The connection broke off or was refused, in words."""


def fetch(name: str, to: Path, console: Console) -> list[str]:
    """Bring the data set `name` into the folder `to`, verified; what lies there already is verified, not fetched again.

    Gives lines that say what was done. Without a published checksum, the SHA-256 at first use is kept beside the archive and
    holds from then on. Raises UserError where there is no network (what came so far is kept, and the next call goes on
    from there), or where a file is not what it should be: one just fetched is then kept under another name, with .bad.
    """
    if name in NOT_FETCHED:
        raise UserError(f"{name} {NOT_FETCHED[name]}")
    official = lookup(OFFICIAL, name, "dataset to fetch")
    path, part = to / official.file, to / f"{official.file}.part"
    if not path.exists() and official.folder is not None and (to / official.folder).is_dir():
        return [f"{to / official.folder}: already there, and no archive to compare with"]
    expected = official.md5 or _recorded(_record(official, to))
    if path.exists():
        return [_accept(path, official, to, expected)]
    to.mkdir(parents=True, exist_ok=True)
    _download(official.url, part, path, console)
    try:
        said = _accept(part, official, to, expected)
    except UserError as error:
        bad = part.replace(path.with_name(f"{path.name}.bad"))
        raise UserError(f"{error}; what came from {official.url} is kept as {bad}, the same command fetches it anew") from None
    part.replace(path)
    return [f"{path}: fetched", said]


# What came, or was there


def _accept(archive: Path, official: Official, to: Path, expected: str | None) -> str:
    """Verify the archive, unpack it where that is due, and say so. Raises UserError where it is not the right one."""
    kind = "sha256" if official.md5 is None else "md5"
    found = _checksum(archive, kind)
    if expected not in (None, found):
        raise UserError(f"{archive}: is not {official.file} as it should be: {kind.upper()} {found}, expected {expected}")
    source = "as published" if official.md5 else "as recorded at first use" if expected else "recorded now: none is published"
    said = f"{official.file}: {kind.upper()} {found}, {source}"
    if official.folder is not None and not (to / official.folder).exists():
        unpack(archive, to / official.folder, root=official.folder)
        said += f"; unpacked to {to / official.folder}"
    if expected is None:
        write_atomically(_record(official, to), f"{found}  {official.file}\n")  # as sha256sum -c reads it
    return said


def _checksum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _record(official: Official, to: Path) -> Path:
    return to / f"{official.file}.sha256"


def _recorded(record: Path) -> str | None:
    """The checksum kept at first use, if any."""
    if not record.exists():
        return None
    words = record.read_text(errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise UserError(f"{record}: holds no SHA-256; remove it, and the archive's own is recorded")
    return words[0]


# The download


def _download(url: str, part: Path, path: Path, console: Console) -> None:
    """Fetch all of `url` into `part`, on from what is there. Raises UserError, which says what to do without a network."""
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
    kept = f"; {_size(part)} bytes are kept, the same command goes on from there" if _size(part) else ""
    raise UserError(f"cannot fetch {url} ({reason}): fetch it by other means and put it at {path}{kept}")


def _connect(url: str, part: Path, progress: Progress, task: TaskID) -> None:
    """One connection. Raises _Interrupted where the file is not whole after it."""
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
        raise _Interrupted(_reason(error)) from None


def _receive(response: http.client.HTTPResponse, part: Path, start: int, progress: Progress, task: TaskID) -> None:
    """Append the answer to `part`, or write it anew where the server sends the whole file in spite of the range."""
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if resumed and (first is None or int(first[1]) != start):
        raise _Interrupted("the server sent another range than asked for")
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
        raise _Interrupted(f"broken off after {done} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split())[:120] or type(error).__name__
