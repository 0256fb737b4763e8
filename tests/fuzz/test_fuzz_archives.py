"""Archives are read as CIFAR (tar, tar.gz) and as TinyImageNet (zip), and nothing is written."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cifar_batches import cifar10
from damage_bytes import damaged
from driver import counts, drive, in_address_space, in_memory, in_time, read, watched
from hypothesis import strategies as st

from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset
from advmoe.data.archive import open_zip, read_entry

NAMES = [
    "a",
    "a/b",
    "a/b/c",
    "./a",
    "a/../b",
    "../evil",
    "../../evil",
    "/tmp/evil",
    "C:/evil",
    "c:evil",
    "..\\evil",
    "a//b",
    ".",
    "..",
    "",
    "/",
    "a/",
    "a\nb",
    "a\0b",
    "\u202eb",
    "é",
    "e\u0301",
    "\ud83d\ude00",
    "n" * 300,
    "d/" * 200 + "x",
    "con",
    "a.",
    "data_batch_1",
    "test_batch",
    "cifar-10-batches-py/data_batch_1",
    "wnids.txt",
    "tiny-imagenet-200/wnids.txt",
    "train/x/images/x_0.JPEG",
    "val/images/a",
    "val/val_annotations.txt",
    "~/evil",
    "$HOME/evil",
    "-rf",
    "\x1b[2J",
    "\udce9",
]
TYPES = (
    [tarfile.REGTYPE] * 6
    + [tarfile.DIRTYPE] * 2
    + [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.CONTTYPE,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.AREGTYPE,
        tarfile.SOLARIS_XHDTYPE,
        b"V",
        b"?",
    ]
)
LINKS = ["/etc/passwd", "../../evil", "a", ".", ""]
CONTENTS = [
    b"",
    b"x",
    b"hello" * 200,
    bytes(600),
    bytes(3 * 2**20),
    b"30 mtime=1e999\n20 size=-512\n",
    b"18 path=../evil\n",
    b"20 GNU.sparse.map=0,1\n",
    b"a\tx\n",
]
SIZES = [None] * 8 + [0, 1, 511, 2**21, 2**33, 2**40, -1, -512, -1024, -(2**40)]
PAX = [{}] * 4 + [
    {"size": "-512"},
    {"size": "9" * 5000},
    {"size": "1e9"},
    {"path": "../evil"},
    {"path": "a\0b"},
    {"linkpath": "/etc"},
    {"mtime": "nan"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"GNU.sparse.map": "0,1,99999999999,1"},
    {"GNU.sparse.size": "99999999999"},
    {"GNU.sparse.realsize": "-5"},
    {"hdrcharset": "BINARY"},
    {"uid": "x"},
    {"charset": "punycode"},
]


def _number(value: int) -> bytes:
    """A size in the 12 bytes of a header: octal, or in base 256 if it is too large or negative."""
    if 0 <= value < 8**11:
        return f"{value:011o}".encode() + b"\0"
    return (value & (256**12 - 1) | (0x80 << 88 if value >= 0 else 0)).to_bytes(12, "big")


def tar_member(name: str, kind: bytes, link: str, content: bytes, size: int | None, pax: dict[str, str]) -> bytes:
    """A header with a valid checksum, perhaps with a wrong size, and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, len(content), pax
    try:
        head = info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT, errors="surrogateescape")
    except (ValueError, UnicodeError):
        head = tarfile.TarInfo("x").tobuf()
    if size is not None:
        block = bytearray(head[-512:])
        block[124:136] = _number(size)
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        head = head[:-512] + bytes(block)
    return head + content + bytes(-len(content) % 512)


def tars() -> st.SearchStrategy[bytes]:
    members = st.builds(
        tar_member,
        st.sampled_from(NAMES),
        st.sampled_from(TYPES),
        st.sampled_from(LINKS),
        st.sampled_from(CONTENTS),
        st.sampled_from(SIZES),
        st.sampled_from(PAX),
    )
    ends = st.sampled_from([bytes(1024), bytes(1024), bytes(1024), b"", bytes(10_240), bytes(3 * 2**20), bytes(512) + b"x" * 512])
    return st.builds(lambda parts, end: b"".join(parts) + end, st.lists(members, max_size=4), ends)


def zip_file(members: list[tuple[str, bytes, int, int]], patches: list[tuple[str, int]]) -> bytes:
    """A zip of (name, content, method, mode), whose central directory is then patched: (field, value) of its first member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, method, mode in members:
            try:
                info = zipfile.ZipInfo(name or "x")
                info.external_attr, info.compress_type = mode << 16, method
                archive.writestr(info, content)
            except UnicodeError:
                continue
    packed = bytearray(file.getvalue())
    fields = {
        "flags": (8, "<H"),
        "method": (10, "<H"),
        "crc": (16, "<I"),
        "packed": (20, "<I"),
        "size": (24, "<I"),
        "offset": (42, "<I"),
    }
    start = packed.find(b"PK\x01\x02")
    for field, value in patches if start >= 0 else ():
        offset, form = fields[field]
        struct.pack_into(form, packed, start + offset, value & (2 ** (8 * struct.calcsize(form)) - 1))
    return bytes(packed)


def zips() -> st.SearchStrategy[bytes]:
    methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    modes = st.sampled_from([0o100644, 0, 0o040755, 0o120777, 0o010644, 0o020644, 0o060644, 0o140644])
    member = st.tuples(st.sampled_from(NAMES), st.sampled_from(CONTENTS), methods, modes)
    patch = st.tuples(
        st.sampled_from(["flags", "method", "crc", "packed", "size", "offset"]),
        st.sampled_from([0, 1, 8, 12, 14, 99, 2**16, 2**32 - 1]),
    )
    return st.builds(zip_file, st.lists(member, max_size=3), st.lists(patch, max_size=2))


def _many() -> bytes:
    return zip_file([(f"m{number}", bytes(2**20), zipfile.ZIP_DEFLATED, 0) for number in range(300)], [])


def _flat(method: int, patches: list[tuple[str, int]]) -> bytes:
    return zip_file([("wnids.txt", bytes(300 * 2**20), method, 0)], patches)


def _classes() -> bytes:
    names = "".join(f"n{number}\n" for number in range(400_000)).encode()
    return zip_file([("wnids.txt", names, zipfile.ZIP_DEFLATED, 0)], [])


def _tar() -> bytes:
    return tar_member("data_batch_1", tarfile.REGTYPE, "", bytes(300 * 2**20), None, {}) + bytes(1024)


def _trailing() -> bytes:
    return tar_member("data_batch_1", tarfile.REGTYPE, "", b"x", None, {}) + bytes(300 * 2**20)


BOMBS: dict[str, Callable[[], bytes]] = {  # small archives with large contents
    "in one member": lambda: _flat(zipfile.ZIP_DEFLATED, []),
    "in many small members": _many,
    "in a list of classes": _classes,
    "with wrong sizes": lambda: _flat(zipfile.ZIP_DEFLATED, [("size", 100), ("packed", 2**31)]),
    "with a wrong packed size": lambda: _flat(zipfile.ZIP_DEFLATED, [("packed", 2**31)]),
    "in bzip2 with a wrong size": lambda: _flat(zipfile.ZIP_BZIP2, [("size", 100)]),
    "in LZMA with a wrong size": lambda: _flat(zipfile.ZIP_LZMA, [("size", 100)]),
    **{f"in {form.__name__}": lambda form=form: form.compress(_tar()) for form in (gzip, bz2, lzma)},
    "past the end": lambda: gzip.compress(_trailing()),
    "packed twice": lambda: gzip.compress(gzip.compress(_tar())),
    "in thousands of empty members": lambda: (
        b"".join(tar_member(f"a{n}", b"0", "", b"", None, {}) for n in range(3000)) + bytes(1024)
    ),
}


def archives() -> st.SearchStrategy[bytes]:
    """Tars and zips with odd members, compressed once, twice or not at all, complete or damaged."""
    packings = st.sampled_from(
        [lambda content: content] * 4
        + [lambda content: gzip.compress(content, 1), lambda content: gzip.compress(gzip.compress(content, 1), 1), bz2.compress]
    )
    packed = st.one_of(st.builds(lambda packing, content: packing(content), packings, tars()), zips())
    valid = tar_member("a/b", tarfile.REGTYPE, "", b"hello" * 50, None, {}) + bytes(1024)
    zipped = zip_file([("a/b", b"hello" * 50, zipfile.ZIP_DEFLATED, 0o100644), ("c/", b"", 0, 0o040755)], [])
    return st.one_of(packed, packed, packed, damaged(valid, zipped, gzip.compress(valid)), st.binary(max_size=30))


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """check(content): read all files of a zip, and read the archive as CIFAR and as TinyImageNet."""
    folder = tmp_path / "in"
    folder.mkdir()
    archive = folder / "archive.tar"

    def check_one(content: bytes) -> None:
        archive.write_bytes(content)
        read(lambda: read_all(archive))
        for name in ("cifar10", "tinyimagenet"):
            read(lambda name=name: load_dataset(DataConfig(dataset=name, data_dir=str(archive))))
        assert list(tmp_path.rglob("*")) == [folder, archive]

    return check_one


def read_all(path: Path) -> None:
    with open_zip(path) as archive:
        for name in archive.namelist():
            read_entry(archive, name, str(path))


@counts
def test_archives(inputs: int, request: pytest.FixtureRequest, tmp_path: Path, check: Any) -> None:
    drive(request, inputs, "archive (tar, zip)", archives(), tmp_path, check)


def test_an_archive_of_batches_is_read(tmp_path: Path) -> None:
    """A valid archive is read, so the others are refused for their damage."""
    folder = cifar10(tmp_path / "set").parent
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    assert isinstance(load_dataset(DataConfig(dataset="cifar10", data_dir=str(tmp_path / "archive.tar.gz"))), Splits)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str, tmp_path: Path, check: Any) -> None:
    content = BOMBS[name]()
    with in_address_space(), in_memory(), in_time(), watched(tmp_path):
        check(content)
