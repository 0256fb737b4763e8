"""Archives (tar, tar.gz, zip) from anywhere, unpacked whole or not at all, and never outside the target."""

import errno
import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from advmoe.errors import UserError

CHUNK = 2**20  # bytes read at once, and the longest header of a tar
ABSOLUTE = re.compile(r"/|[A-Za-z]:")


@dataclass(frozen=True)
class Limits:
    """What an archive may hold before it is taken for a bomb; every known data set lies far below."""

    total: int = 2**35
    """Bytes of all files together."""
    members: int = 2_000_000
    """Files and folders."""
    ratio: int = 200
    """Unpacked bytes for each packed one (of an archive as a whole, and of a zip's member), past the first MiB."""


LIMITS = Limits()


@dataclass(frozen=True)
class Member:
    """One file or folder: what the archive declares, and where its content is read."""

    name: str
    size: int
    packed: int
    content: IO[bytes] | None  # None: a folder


def unpack(archive: Path, target: Path, root: str = ".", limits: Limits = LIMITS) -> None:
    """Unpack what lies under the folder `root` of the archive as the new folder `target`.

    Everything is written to a draft beside `target` that is renamed at the end: an interrupt or a bad archive leaves nothing.
    Raises UserError, naming the member, on a name that leads outside, a link, a device, a bomb, or damage.
    """
    if target.exists():
        raise UserError(f"{target}: is already there")
    with _draft_folder(target) as draft:
        try:
            _write_all(archive, draft, limits)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a damaged archive raises nearly anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # as of a place before the file's first byte
                raise  # of the disk, not of the archive
            raise UserError(f"{archive}: not a whole archive ({' '.join(str(error).split())[:120]})") from None
        if not (draft / root).is_dir():
            raise UserError(f"{archive}: holds no folder {root}")
        (draft / root).replace(target)


@contextmanager
def _draft_folder(target: Path) -> Iterator[Path]:
    """A folder of this process alone beside `target`, gone after the block with whatever is still in it."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    content = draft / "content"  # so that the content as a whole can be moved away
    try:
        content.mkdir(parents=True)
        yield content
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_all(archive: Path, folder: Path, limits: Limits) -> None:
    count = total = 0
    most = limits.ratio * archive.stat().st_size + CHUNK
    with closing(_members(archive, limits)) as members:
        for member in members:
            where = f"{archive}: member '{member.name}'"
            count, total = count + 1, total + member.size
            if count > limits.members:
                raise UserError(f"{where} is one too many: at most {limits.members} are unpacked")
            if total > limits.total:
                raise UserError(f"{where} brings the content to {total} bytes: at most {limits.total} are unpacked")
            if member.size > CHUNK and member.size > limits.ratio * member.packed:
                raise UserError(f"{where} unpacks {member.packed} bytes to {member.size}: at most {limits.ratio} times as many are")
            if total > most:
                raise UserError(f"{where} brings the content to {total} bytes, too many for its size")
            _write(member, folder / inside(member.name, where), where)


def inside(name: str, where: str) -> str:
    """The name, if it stays in the folder that it is taken in. Raises UserError, led by `where`."""
    if not name.isprintable() or "\\" in name or ".." in name.split("/") or ABSOLUTE.match(name):
        raise UserError(f"{where} has a name that could lead out of the target folder")
    return name


def _write(member: Member, path: Path, where: str) -> None:
    try:
        if member.content is None:
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with member.content as content, path.open("xb") as file:
            shutil.copyfileobj(content, file, CHUNK)
            written = file.tell()
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{where} has the place of another member") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{where} has a name that is too long") from None
    if written != member.size:
        raise UserError(f"{where} holds {written} bytes, not the {member.size} declared")


def _members(archive: Path, limits: Limits) -> Generator[Member]:
    with archive.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return _zip_members(archive)
    return tar_members(archive, limits)


def _zip_members(archive: Path) -> Generator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            where = f"{archive}: member '{info.filename}'"
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{where} is neither a file nor a folder")
            if info.flag_bits & 1:
                raise UserError(f"{where} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others give all of a chunk at once
                raise UserError(f"{where} is packed by method {info.compress_type}; 0 and 8 (deflate) are unpacked")
            try:
                content = None if info.is_dir() else file.open(info)
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise UserError(f"{where} cannot be read ({error})") from None
            yield Member(info.filename, info.file_size, info.compress_size, content)


def tar_members(archive: Path, limits: Limits) -> Generator[Member]:
    """Members of a tar or tar.gz in one pass, to its very end: it is decompressed only once. Their names are not checked.

    Raises UserError on a link, a device, a bomb or an end cut off, and nearly anything on damage.
    """
    with archive.open("rb") as file:
        opened: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opened(archive, "rb") as stream:
        bounded: Any = _Bounded(stream, limits.ratio * archive.stat().st_size + CHUNK, archive)
        with tarfile.open(fileobj=bounded, mode="r:") as file:
            for info in iter(file.next, None):
                if not (info.isfile() or info.isdir()) or info.issparse():
                    raise UserError(f"{archive}: member '{info.name}' is neither a file nor a folder")
                if info.size < 0:  # the next member would be looked for before this one, again and again
                    raise UserError(f"{archive}: member '{info.name}' says that it has {info.size} bytes")
                yield Member(info.name, info.size, info.size, file.extractfile(info) if info.isfile() else None)
            _ended(archive, bounded, file.offset)


class _Bounded:
    """A stream that refuses to go past `limit`, or to be read at once by more than a chunk (a tar's header may claim any size)."""

    def __init__(self, stream: IO[bytes], limit: int, archive: Path) -> None:
        self.stream, self.limit, self.archive = stream, limit, archive

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            raise UserError(f"{self.archive}: a header of {size} bytes is no honest one")
        self._allow(self.stream.tell() + size)
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._allow(offset)  # tarfile seeks from the start only
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def _allow(self, place: int) -> None:
        if place > self.limit:
            raise UserError(f"{self.archive}: unpacks to more than {self.limit} bytes, too many for its size")


def _ended(archive: Path, stream: "_Bounded", offset: int) -> None:
    """Read on to the end, where gzip has its checksum: after the last member, a whole tar has zeros only."""
    stream.seek(offset)
    rest = stream.read(tarfile.BLOCKSIZE)
    whole = len(rest) == tarfile.BLOCKSIZE
    while rest and whole:
        whole = not any(rest)
        rest = stream.read(CHUNK)
    if not whole:
        raise UserError(f"{archive}: not a whole archive (broken off or damaged after {offset} bytes)")
