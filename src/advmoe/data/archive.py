"""Archives (tar, tar.gz, zip) from untrusted sources: their files are read where they are, and nothing is unpacked to the disk."""

import gzip
import os
import tarfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from advmoe.errors import UserError, reason_of
from advmoe.files import check_plain

CHUNK = 2**20  # bytes that are read at once, and the longest header of a tar
RATIO = 200  # the most unpacked bytes for each packed byte; the first MiB is free
MAX_FILE = 2**40  # bytes of an archive; the one of ImageNet has 148 billion
MAX_ENTRY = 2**23  # bytes of one file of a zip; TinyImageNet's list of 10,000 test images has 0.4 million


@dataclass(frozen=True)
class Member:
    """One file or folder of a tar: what the archive declares, and a stream of its content."""

    name: str
    size: int
    content: IO[bytes] | None  # None for a folder


def check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raises UserError if a tar member is a link, a device or sparse, or if it declares a size below 0. Its name is not checked,
    because nothing is written under it."""
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise UserError(f"{path}: member '{member.name}' is neither a file nor a folder")
    if member.size < 0:  # tarfile would look for the next member before this one, without end
        raise UserError(f"{path}: member '{member.name}' declares a size of {member.size} bytes")


@contextmanager
def open_zip(path: Path, kind: str = "zip archive") -> Iterator[zipfile.ZipFile]:
    """A zip archive. Raises UserError, which calls it a `kind`, if its directory of files is damaged."""
    check_plain(path, MAX_FILE)
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # a damaged archive can raise nearly any exception
            raise UserError(f"{path}: damaged or incomplete {kind} ({reason_of(error)})") from None
        yield archive


def read_entry(archive: zipfile.ZipFile, name: str, where: str, limit: int = MAX_ENTRY) -> bytes:
    """The content of one file of a zip.

    Raises UserError, which starts with `where`, if it is damaged, has more than `limit` bytes, or more than RATIO allows. The sizes
    are declared in the archive and may be wrong: nothing is unpacked beyond the declared size, and no file is packed in more bytes
    than the archive has.
    """
    try:
        entry = archive.getinfo(name)
        packed = min(entry.compress_size, archive.start_dir)  # the directory of files comes after the files
        most = min(limit, RATIO * packed + CHUNK)
        if entry.file_size > most:
            raise UserError(f"{where}: has {entry.file_size:,} bytes, packed in {packed:,}; at most {most:,} are read")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others return any amount of data at once
            raise UserError(f"{where}: packed by method {entry.compress_type}; only 0 (stored) and 8 (deflate) are read")
        with archive.open(entry) as file:
            return file.read(entry.file_size + 1)  # one more: the checksum is compared at the end
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: damaged in the archive ({reason_of(error)})") from None


def tar_members(archive: Path) -> Generator[Member]:
    """The members of a tar or tar.gz, decompressed once from start to end.

    Raises UserError as `check_plain` and `check_member`, and on a bomb or a missing end, and nearly any exception on damage.
    """
    check_plain(archive, MAX_FILE)
    with archive.open("rb") as file:
        open_stream: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with open_stream(archive, "rb") as stream:
        bounded: Any = _BoundedStream(stream, RATIO * archive.stat().st_size + CHUNK, archive)
        with tarfile.open(fileobj=bounded, mode="r:") as file:
            for info in iter(file.next, None):
                check_member(archive, info)
                yield Member(info.name, info.size, file.extractfile(info) if info.isfile() else None)
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
