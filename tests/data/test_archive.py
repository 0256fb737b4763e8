"""Archives: a good one is unpacked completely, of a bad one nothing remains."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from refusal import refusal

from advmoe.data import archive as module
from advmoe.data.archive import Limits, unpack
from advmoe.errors import UserError

NOISE = random.Random(0).randbytes(70_000)
CONTENT = {"set/a.txt": b"first", "set/deep/er/b.bin": NOISE, "set/empty": b""}


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


def tar_gz(path: Path, files: Mapping[str, bytes]) -> Path:
    return tar(path, files, "w:gz")


def zipped(path: Path, files: Mapping[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


KINDS: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {"tar": tar, "tar.gz": tar_gz, "zip": zipped}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_line(archive: Path, limits: Limits = module.LIMITS) -> str:
    """The error of unpacking; the disk stays unchanged."""
    before = sorted(archive.parent.iterdir())
    text = refusal(unpack, archive, archive.parent / "out", limits=limits)
    assert sorted(archive.parent.iterdir()) == before
    assert not (archive.parent.parent / "evil").exists()
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_unpacked(kind: str, tmp_path: Path) -> None:
    unpack(KINDS[kind](tmp_path / "archive", CONTENT), tmp_path / "out")
    assert contents(tmp_path / "out") == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


@pytest.mark.parametrize("kind", KINDS)
def test_root_becomes_the_target(kind: str, tmp_path: Path) -> None:
    unpack(KINDS[kind](tmp_path / "archive", CONTENT | {"__MACOSX/junk": b"x"}), tmp_path / "set", root="set")
    assert contents(tmp_path / "set") == {name.removeprefix("set/"): content for name, content in CONTENT.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "set"]


def test_folders_of_an_archive_are_made(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("bare/", b"")
    unpack(tmp_path / "archive", tmp_path / "out")
    assert (tmp_path / "out/bare").is_dir()
    tar(tmp_path / "second", {}, other=tarfile.DIRTYPE)
    unpack(tmp_path / "second", tmp_path / "out2")
    assert (tmp_path / "out2/other").is_dir()


def test_missing_root_is_named(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", CONTENT)
    with pytest.raises(UserError, match="archive: contains no folder other"):
        unpack(archive, tmp_path / "out", root="other")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(UserError, match="out: already exists"):
        unpack(zipped(tmp_path / "archive", CONTENT), tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b"mine"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/tmp/evil", "C:/evil", "c:evil", "..\\evil", "set/new\nline"])
def test_names_that_lead_outside_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = error_line(KINDS[kind](tmp_path / "in/archive", {"good": b"good", name: b"evil"}))
    assert "has a name that could lead out of the target folder" in text
    assert "evil" in text or "new line" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_special_members_of_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    assert "member 'odd' is neither a file nor a folder" in error_line(tar(tmp_path / "archive", CONTENT, odd=kind))


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644])
def test_special_members_of_a_zip_are_refused(mode: int, tmp_path: Path) -> None:
    text = error_line(zipped(tmp_path / "archive", {"odd": b"/etc/passwd"}, mode))
    assert "member 'odd' is neither a file nor a folder" in text


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_bounded(kind: str, tmp_path: Path) -> None:
    archive = KINDS[kind](tmp_path / "archive", {"a": NOISE[:600], "b": NOISE[600:1200]})
    assert "member 'b' brings the content to 1200 bytes: at most 1000" in error_line(archive, Limits(total=1000))
    assert "member 'b' is one too many: at most 1" in error_line(archive, Limits(members=1))
    unpack(archive, tmp_path / "out", limits=Limits(total=1200, members=2))


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    bomb = {"bomb": bytes(30 * 2**20)}
    assert "member 'bomb' unpacks" in error_line(zipped(tmp_path / "archive", bomb))
    assert "too many for the size of the archive" in error_line(tar_gz(tmp_path / "archive", bomb))


@pytest.mark.parametrize(("declared", "message"), [(10, "Bad CRC-32 for file 'liar'"), (6000, "has 5000 bytes, not the 6000")])
def test_wrongly_declared_size_is_refused(declared: int, message: str, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", {"liar": b"x" * 5000})
    content = archive.read_bytes()
    assert content.count(struct.pack("<I", 5000)) == 2
    archive.write_bytes(content.replace(struct.pack("<I", 5000), struct.pack("<I", declared)))
    assert message in error_line(archive)


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "archive").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "at most 1048576 are read" in error_line(tmp_path / "archive")


@pytest.mark.parametrize("kind", KINDS)
def test_file_instead_of_a_folder_is_refused(kind: str, tmp_path: Path) -> None:
    archive = KINDS[kind](tmp_path / "archive", {"a": b"a", "a/b": b"b"})
    assert "member 'a/b' has the same path as another member" in error_line(archive)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": b"a"}, a=tarfile.REGTYPE)
    assert "member 'a' has the same path as another member" in error_line(archive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_truncated_archive_leaves_nothing(kind: str, share: float, tmp_path: Path) -> None:
    archive = KINDS[kind](tmp_path / "archive", CONTENT)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    assert "archive: " in error_line(archive)


def test_a_tar_truncated_between_members_leaves_nothing(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": bytes(512), "b": bytes(512)})
    archive.write_bytes(archive.read_bytes()[:1024])
    assert "cut off or damaged after 1024 bytes" in error_line(archive)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_flipped_byte_leaves_nothing(kind: str, tmp_path: Path) -> None:
    archive = KINDS[kind](tmp_path / "archive", CONTENT)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 0xFF
    archive.write_bytes(content)
    assert "damaged or incomplete archive" in error_line(archive)


def test_damaged_header_in_a_tar_leaves_nothing(tmp_path: Path) -> None:
    archive = tar(tmp_path / "archive", {"a": bytes(512), "b": bytes(512)})
    content = bytearray(archive.read_bytes())
    content[1024] ^= 0xFF  # the name in the second header
    archive.write_bytes(content)
    assert "cut off or damaged after 1024 bytes" in error_line(archive)


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>not found</html>", gzip.compress(b"no tar", mtime=0)])
def test_other_files_are_no_archives(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    assert "archive: damaged or incomplete archive" in error_line(tmp_path / "archive")


def test_encrypted_member_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "archive", {"secret": b"x"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert "member 'secret' is encrypted" in error_line(archive)


def test_two_processes_of_the_same_number_do_not_share_a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be in two containers that share a folder."""
    archive, damaged, write_all = zipped(tmp_path / "a", CONTENT), tmp_path / "b", module._write_all
    damaged.write_bytes(b"PK")

    def write_while_another_process_fails(*arguments: Any) -> None:
        monkeypatch.setattr(module, "_write_all", write_all)
        write_all(*arguments)
        with pytest.raises(UserError, match="damaged or incomplete"):
            unpack(damaged, tmp_path / "set", root="set")

    monkeypatch.setattr(module, "_write_all", write_while_another_process_fails)
    unpack(archive, tmp_path / "set", root="set")
    assert {f"set/{name}": content for name, content in contents(tmp_path / "set").items()} == CONTENT


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "archive", CONTENT)
    write = module._write

    def interrupted(member: module.Member, path: Path, where: str) -> None:
        if member.name == "set/empty":
            assert any(path.parents[1].rglob("a.txt"))  # a file that must be removed
            raise KeyboardInterrupt
        write(member, path, where)

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_full_disk_stays_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "archive", CONTENT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("advmoe.data.archive.shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


# Bugs that tests/fuzz revealed


def test_many_small_members_are_a_bomb_together(tmp_path: Path) -> None:
    """Each has 1 MiB, which any single member may have whatever its packed size."""
    text = error_line(zipped(tmp_path / "archive", {f"m{number}": bytes(2**20) for number in range(20)}))
    assert "too many for the size of the archive" in text


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_methods_that_are_not_unpacked_in_small_chunks_are_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w", method) as archive:
        archive.writestr("bomb", bytes(2**20))
    assert f"member 'bomb' is packed by method {method}" in error_line(tmp_path / "archive")


def test_names_that_no_disk_takes_are_refused(tmp_path: Path) -> None:
    assert "has a name that is too long" in error_line(tar(tmp_path / "archive", {"n" * 300: b"x"}))
    assert "has a name that is too long" in error_line(zipped(tmp_path / "archive", {"d/" * 3000 + "x": b"x"}))


def test_offset_before_the_archive_is_damage(tmp_path: Path) -> None:
    """The declared offset of the central directory is too large, so zipfile looks for members before the first byte."""
    content = bytearray(zipped(tmp_path / "archive", {"a": b"a"}).read_bytes())
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<I", content, end + 16, 10_000)
    (tmp_path / "archive").write_bytes(content)
    assert "damaged or incomplete archive" in error_line(tmp_path / "archive")


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
    assert "archive: " in error_line(archive)


def test_zeros_past_the_end_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(gzip.compress(tar(tmp_path / "plain", {"a": b"a"}).read_bytes() + bytes(30 * 2**20)))
    (tmp_path / "plain").unlink()
    assert "too many for the size of the archive" in error_line(tmp_path / "archive")
