"""Archives: the files of a good one are read, those of a bad one are refused before they take memory."""

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from refusal import refusal

from advmoe.data.archive import open_zip, read_entry, tar_members


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w", **special: bytes) -> Path:
    """A tar of files; `special` gives members of other types: name=type."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind in special.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def read_tar(path: Path) -> dict[str, bytes | None]:
    return {member.name: member.content and member.content.read(2**20) for member in tar_members(path)}


def zipped(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a", content)
    return path


def patched(path: Path, offset: int, value: int, form: str = "<I") -> Path:
    """The zip with another number at an offset of its first file's entry in the directory of files."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, content.index(b"PK\x01\x02") + offset, value)
    path.write_bytes(content)
    return path


PACKED, SIZE = 20, 24  # offsets


def read_zip(path: Path, **options: int) -> bytes:
    with open_zip(path) as archive:
        return read_entry(archive, "a", "here", **options)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Opening it would wait for ever for a process that writes to it."""
    os.mkfifo(tmp_path / "a.zip")
    assert refusal(read_zip, tmp_path / "a.zip").endswith("a.zip: not a plain file")
    assert refusal(read_tar, tmp_path / "a.zip").endswith("a.zip: not a plain file")


# Tars


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_files_of_a_tar_are_read(mode: str, tmp_path: Path) -> None:
    files = {"set/a.txt": b"first", "set/b.bin": bytes(range(256)) * 100, "set/empty": b""}
    assert read_tar(tar(tmp_path / "archive", files, mode, folder=tarfile.DIRTYPE)) == {**files, "folder": None}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_special_members_of_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": b"a"}, odd=kind)
    assert refusal(read_tar, archive) == f"{archive}: member 'odd' is neither a file nor a folder"


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"bomb": bytes(30 * 2**20)}, "w:gz")
    assert "too many for the size of the archive" in refusal(read_tar, archive)


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "archive").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "at most 1048576 are read" in refusal(read_tar, tmp_path / "archive")


def test_a_tar_truncated_between_members_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": bytes(512), "b": bytes(512)})
    archive.write_bytes(archive.read_bytes()[:1024])
    assert "cut off or damaged after 1024 bytes" in refusal(read_tar, archive)


def test_damaged_header_in_a_tar_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": bytes(512), "b": bytes(512)})
    content = bytearray(archive.read_bytes())
    content[1024] ^= 0xFF  # the name in the second header
    archive.write_bytes(content)
    assert "cut off or damaged after 1024 bytes" in refusal(read_tar, archive)


def resized(content: bytes, size: int) -> bytes:
    """A tar whose first header declares `size` bytes (in base 256), with the right checksum."""
    block = bytearray(content[:512])
    block[124:136] = size.to_bytes(12, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + content[512:]


@pytest.mark.parametrize("size", [-512, -1, -(2**40)])
def test_negative_sizes_do_not_move_the_reader_back(size: int, tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {}, loop=tarfile.DIRTYPE)
    archive.write_bytes(resized(archive.read_bytes(), size))
    assert "archive: " in refusal(read_tar, archive)


def test_zeros_past_the_end_are_bounded(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(gzip.compress(tar(tmp_path / "plain", {"a": b"a"}).read_bytes() + bytes(30 * 2**20)))
    assert "too many for the size of the archive" in refusal(read_tar, archive)


# Zips


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("content", [b"", b"first", bytes(2**20)])
def test_a_file_of_a_zip_is_read(content: bytes, method: int, tmp_path: Path) -> None:
    assert read_zip(zipped(tmp_path / "archive", content, method)) == content


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>not found</html>"])
def test_other_files_are_no_zips(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    assert f"{tmp_path}/archive: damaged or incomplete zip archive (" in refusal(read_zip, tmp_path / "archive")


def test_files_over_the_limit_are_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", bytes(1000), zipfile.ZIP_STORED)
    assert len(read_zip(archive, limit=1000)) == 1000
    assert refusal(read_zip, archive, limit=999) == "here: has 1,000 bytes, packed in 1,000; at most 999 are read"
    large = zipped(tmp_path / "large", bytes(2**23 + 1), zipfile.ZIP_STORED)
    assert refusal(read_zip, large).endswith("at most 8,388,608 are read")


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ({}, "here: has 31,457,280 bytes, packed in 30,"),
        ({PACKED: 2**31}, "here: has 31,457,280 bytes, packed in 30,"),
        ({SIZE: 100}, "here: damaged in the archive (Bad CRC-32"),
        ({SIZE: 2**31, PACKED: 2**31}, "here: has 2,147,483,648 bytes, packed in 30,"),
    ],
    ids=["honest", "wrong packed size", "wrong size", "both wrong"],
)
def test_bombs_take_no_memory(patches: dict[int, int], message: str, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", bytes(30 * 2**20))
    for offset, value in patches.items():
        patched(archive, offset, value)
    tracemalloc.start()
    try:
        assert refusal(read_zip, archive, limit=2**40).startswith(message)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_declared_too_small_is_refused(tmp_path: Path) -> None:
    archive = patched(zipped(tmp_path / "archive", b"x" * 5000), SIZE, 0)
    assert "here: damaged in the archive (Bad CRC-32" in refusal(read_zip, archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_any_amount_at_once_are_refused(method: int, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", b"x", method)
    assert refusal(read_zip, archive) == f"here: packed by method {method}; only 0 (stored) and 8 (deflate) are read"


def test_encrypted_files_are_refused(tmp_path: Path) -> None:
    archive = patched(zipped(tmp_path / "archive", b"x"), 8, 1, "<H")
    assert "is encrypted, password required" in refusal(read_zip, archive)


def test_offset_before_the_archive_is_damage(tmp_path: Path) -> None:
    """The declared offset of the directory of files is too large, so zipfile looks for files before the first byte."""
    content = bytearray(zipped(tmp_path / "archive", b"a").read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x05\x06") + 16, 10_000)
    (tmp_path / "archive").write_bytes(content)
    assert "damaged" in refusal(read_zip, tmp_path / "archive")
