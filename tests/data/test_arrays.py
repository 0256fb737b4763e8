"""Files of numpy arrays, good and hostile."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from advmoe.data.arrays import open_npz, parse_npy, read_npy
from advmoe.errors import UserError


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.zeros((0, 3), np.uint8)]
)
def test_arrays_come_back(array: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(array))
    assert np.array_equal(read_npy(tmp_path / "a.npy"), array)
    np.savez_compressed(tmp_path / "a.npz", x=array, y=array)
    with open_npz(tmp_path / "a.npz") as arrays:
        assert arrays.names == ["x", "y"]
        assert np.array_equal(arrays["x"], array)


def with_shape(shape: str) -> bytes:
    return npy(np.zeros((10, 10), np.uint8)).replace(b"(10, 10)", shape.encode())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"\x93NUMPY\x09\x00", ""),
        (npy(np.zeros(100))[:-1], "799 bytes, 800 declared"),
        (with_shape("(10**9)"), ""),
        (with_shape("(9e9, 1)"), ""),
        (with_shape("(9, 10) "), "100 bytes, 90 declared"),
        (npy(np.zeros(0)).replace(b"(0,)", b"(9**9,)"), ""),
        (npy(np.array([{}])), "Python objects"),
    ],
)
def test_damaged_arrays_are_refused_before_anything_is_allocated(content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^here: not an array that can be read \(.*{reason}"):
        parse_npy(content, "here")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.npz: damaged or incomplete \.npz file"), open_npz(path):
        pass
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy(np.zeros(100, np.uint8)))
    path.write_bytes(path.read_bytes().replace(bytes(90), bytes(89) + b"x"))
    with pytest.raises(UserError, match=r"a\.npz: x: damaged in the archive"), open_npz(path) as arrays:
        arrays["x"]


def test_arrays_of_more_than_the_bound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmoe.data.arrays.MAX_BYTES", 2**20)
    np.savez(tmp_path / "long.npz", x=np.zeros(2**21, np.uint8))
    with (
        pytest.raises(UserError, match=r"long.npz: x: has 2,097,280 bytes, .*; at most 1,048,576 are read"),
        open_npz(tmp_path / "long.npz") as arrays,
    ):
        arrays["x"]


def test_arrays_that_are_compressed_more_than_images_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(2**22, np.uint8))
    with (
        pytest.raises(UserError, match=r"x: has 4,194,432 bytes, packed in [\d,]+;"),
        open_npz(tmp_path / "bomb.npz") as arrays,
    ):
        arrays["x"]
