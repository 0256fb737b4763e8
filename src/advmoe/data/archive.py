"""Archives (tar, tar.gz, zip) from untrusted sources: unpacked completely or not at all, and never outside the target folder."""

import errno
import gzip
import os
import re
import secrets
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from advmoe.errors import UserError, reason_of

CHUNK = 2**20  # bytes that are read at once, and the longest header of a tar
ABSOLUTE = re.compile(r"/|[A-Za-z]:")


@dataclass(frozen=True)
class Limits:
    """The most that an archive may unpack to (protection against archive bombs); every known data set is far smaller."""

    total: int = 2**35
    """Bytes of all files together."""
    members: int = 2_000_000
    """Files and folders."""
    ratio: int = 200
    """Unpacked bytes for each packed byte, of the archive and of each member of a zip; the first MiB is free."""


LIMITS = Limits()


@dataclass(frozen=True)
class Member:
    """One file or folder: what the archive declares, and a stream of its content."""

    name: str
    size: int
    packed: int
    content: IO[bytes] | None  # None for a folder


def unpack(archive: Path, target: Path, root: str = ".", limits: Limits = LIMITS) -> None:
    """Unpack the folder `root` of the archive as the new folder `target`.

    Everything is written to a temporary folder beside `target`, which is renamed at the end: an interrupt or a bad archive
    leaves nothing behind. Raises UserError, naming the member, on a name that leads outside, a link, a device, a bomb, or damage.
    """
    if target.exists():
        raise UserError(f"{target}: already exists")
    with _draft_folder(target) as draft:
        try:
            _write_all(archive, draft, limits)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a damaged archive can raise nearly any exception
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to before the file
                raise  # an error of the disk, not of the archive
            raise UserError(f"{archive}: damaged or incomplete archive ({reason_of(error)})") from None
        if not (draft / root).is_dir():
            raise UserError(f"{archive}: contains no folder {root}")
        (draft / root).replace(target)


@contextmanager
def _draft_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`; removed after the block, with everything that is still in it.

    Its name is random: processes of several machines or containers that share the folder may have the same number.
    """
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")
    content = draft / "content"  # a folder in it, so that all of the content can be moved away
    try:
        content.mkdir(parents=True)
        yield content
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_all(archive: Path, folder: Path, limits: Limits) -> None:
    count = total = 0
    largest_total = limits.ratio * archive.stat().st_size + CHUNK
    with closing(_members(archive, limits)) as members:
        for member in members:
            where = f"{archive}: member '{member.name}'"
            count, total = count + 1, total + member.size
            if count > limits.members:
                raise UserError(f"{where} is one too many: at most {limits.members} are unpacked")
            if total > limits.total:
                raise UserError(f"{where} brings the content to {total} bytes: at most {limits.total} are unpacked")
            if member.size > CHUNK and member.size > limits.ratio * member.packed:
                raise UserError(f"{where} unpacks {member.packed} bytes to {member.size}: more than {limits.ratio} times as many")
            if total > largest_total:
                raise UserError(f"{where} brings the content to {total} bytes, too many for the size of the archive")
            _write(member, folder / safe_name(member.name, where), where)


def safe_name(name: str, where: str) -> str:
    """The name, if it stays inside the folder that it is unpacked in. Raises UserError, which starts with `where`."""
    if not name.isprintable() or "\\" in name or ".." in name.split("/") or ABSOLUTE.match(name):
        raise UserError(f"{where} has a name that could lead out of the target folder")
    return name


def check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raises UserError if a tar member, which is read in its archive, points outside or is a link, a device or sparse."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: member {member.name} points outside the archive")
    if not (member.isdir() or member.isreg()) or member.issparse() or member.size < 0:
        raise UserError(f"{path}: member {member.name} is a link, a device or sparse, not a plain file")


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
        raise UserError(f"{where} has the same path as another member") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{where} has a name that is too long") from None
    if written != member.size:
        raise UserError(f"{where} has {written} bytes, not the {member.size} declared")


def _members(archive: Path, limits: Limits) -> Generator[Member]:
    with archive.open("rb") as file:
        magic = file.read(2)
    return _zip_members(archive) if magic == b"PK" else tar_members(archive, limits)


def _zip_members(archive: Path) -> Generator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            where = f"{archive}: member '{info.filename}'"
            file_type = stat.S_IFMT(info.external_attr >> 16)
            if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{where} is neither a file nor a folder")
            if info.flag_bits & 1:
                raise UserError(f"{where} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others return any amount of data at once
                raise UserError(f"{where} is packed by method {info.compress_type}; only 0 (stored) and 8 (deflate) are unpacked")
            try:
                content = None if info.is_dir() else file.open(info)
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise UserError(f"{where} cannot be read ({error})") from None
            yield Member(info.filename, info.file_size, info.compress_size, content)


def tar_members(archive: Path, limits: Limits) -> Generator[Member]:
    """The members of a tar or tar.gz, decompressed once from start to end. Their names are not checked.

    Raises UserError on a link, a device, a bomb or a missing end, and nearly any exception on damage.
    """
    with archive.open("rb") as file:
        open_stream: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with open_stream(archive, "rb") as stream:
        bounded: Any = _BoundedStream(stream, limits.ratio * archive.stat().st_size + CHUNK, archive)
        with tarfile.open(fileobj=bounded, mode="r:") as file:
            for info in iter(file.next, None):
                if not (info.isfile() or info.isdir()) or info.issparse():
                    raise UserError(f"{archive}: member '{info.name}' is neither a file nor a folder")
                if info.size < 0:  # tarfile would look for the next member before this one, without end
                    raise UserError(f"{archive}: member '{info.name}' declares a size of {info.size} bytes")
                yield Member(info.name, info.size, info.size, file.extractfile(info) if info.isfile() else None)
            _check_end(archive, bounded, file.offset)


class _BoundedStream:
    """A stream that can be read up to `limit` only, and at most one chunk at a time (a tar's header may claim any size)."""

    def __init__(self, stream: IO[bytes], limit: int, archive: Path) -> None:
        self.stream, self.limit, self.archive = stream, limit, archive

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            raise UserError(f"{self.archive}: a header claims {size} bytes, at most {CHUNK} are read")
        self._check(self.stream.tell() + size)
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(offset)  # tarfile seeks from the start only
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def _check(self, position: int) -> None:
        if position > self.limit:
            raise UserError(f"{self.archive}: unpacks to more than {self.limit} bytes, too many for the size of the archive")


def _check_end(archive: Path, stream: _BoundedStream, offset: int) -> None:
    """Read to the end, where gzip checks its checksum. A complete tar has only zeros after its last member."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    complete = len(block) == tarfile.BLOCKSIZE
    while block and complete:
        complete = not any(block)
        block = stream.read(CHUNK)
    if not complete:
        raise UserError(f"{archive}: damaged or incomplete archive (cut off or damaged after {offset} bytes)")
