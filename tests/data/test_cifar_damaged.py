"""CIFAR-10 whose files are truncated, altered, unreadable or of another kind."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from cifar10 import TEST, TRAIN
from cifar_files import Part, encoded, write_archive, write_table
from damage import cut, error_line, flip_bit, huge_png

from advmoe.config import DataConfig
from advmoe.data import load_dataset


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_pickle(share: float, tmp_path: Path) -> None:
    path = cut(cifar10.write_batches(tmp_path) / "data_batch_2", share)
    assert error_line(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


@pytest.mark.parametrize("size", [0, 1, 9, 200, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, -9, -4, -1])
def test_truncated_tar(size: float, tmp_path: Path) -> None:
    path = cut(cifar10.write_tar(tmp_path), size)
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete tar archive (")


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_tar_with_a_flipped_bit(share: float, tmp_path: Path) -> None:
    path = flip_bit(cifar10.write_tar(tmp_path), share)
    assert error_line(path).startswith(f"{path}: ")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_plain_tar(share: float, tmp_path: Path) -> None:
    path = cut(write_archive(tmp_path / "cifar.tar", cifar10.write_batches(tmp_path), "w"), share)
    assert error_line(path).startswith(f"{path}: ")


@pytest.mark.parametrize("member", ["../../evil", "/etc/evil"])
def test_a_tar_member_that_points_outside_is_not_written(member: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(member))
    assert error_line(path) == f"{path}: contains no file cifar-10-batches-py/data_batch_1"
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n" * 200)
    assert error_line(path).startswith(f"{path}: not a file that CIFAR-10 is read from; give cifar-10-batches-py (folder), ")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_parquet(share: float, tmp_path: Path) -> None:
    path = cut(next(cifar10.write_parquet(tmp_path).glob("test*")), share)
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete Parquet file (")


def test_parquet_that_unpacks_to_more_than_images_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmoe.data.cifar.MAX_BATCH", 2**20)
    path = next(cifar10.write_parquet(tmp_path).glob("train*"))
    write_table(path, img=[bytes(2**15)] * 100, label=[0] * 100)  # the image is stored once
    assert path.stat().st_size < 2**15
    assert error_line(tmp_path) == f"{path}: has more than 1,048,576 bytes of images, the most that is read"


@pytest.mark.parametrize("columns", [("pixels", "label"), ("img", "fine_label")])
def test_wrong_columns(columns: tuple[str, str], tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("train*"))
    write_table(path, **dict(zip(columns, ([b"x"], [0]), strict=True)))
    assert error_line(tmp_path) == f"{path}: needs columns img and label, has {', '.join(columns)}"


BAD_IMAGES = {
    "empty": (b"", "not an image that can be decoded"),
    "text": (b"hello, no image", "not an image that can be decoded"),
    "cut png": (encoded(TRAIN.raw[0])[:150], "not an image that can be decoded"),
    "cut jpeg": (encoded(TRAIN.raw[0], "JPEG")[:400], "not an image that can be decoded"),
    "header alone": (encoded(TRAIN.raw[0])[:8], "not an image that can be decoded"),
    "large": (encoded(TRAIN.raw[0], size=(33, 32)), "the image is 33 x 32, not 32 x 32"),
    "small": (encoded(TRAIN.raw[0], size=(28, 28)), "the image is 28 x 28, not 32 x 32"),
    "postscript": (encoded(TRAIN.raw[0], "EPS"), "not an image that can be decoded (none of PNG, "),
    "bomb": (huge_png(12_000, 12_000), "the image is 12000 x 12000, not 32 x 32"),
    "larger bomb": (huge_png(60_000, 60_000), "not an image that can be decoded (Image size"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.filterwarnings("error")
def test_bad_image_in_parquet_is_named_by_its_row(name: str, tmp_path: Path) -> None:
    image, message = BAD_IMAGES[name]
    path = next(cifar10.write_parquet(tmp_path).glob("train*"))
    items = [{"bytes": encoded(image), "path": None} for image in TRAIN.raw]
    items[17] = {"bytes": image, "path": None}
    write_table(path, img=items, label=TRAIN.labels)
    assert error_line(tmp_path).startswith(f"{path}: row 17: {message}")


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.filterwarnings("error")
def test_bad_image_in_a_folder_is_named_by_its_path(name: str, tmp_path: Path) -> None:
    image, message = BAD_IMAGES[name]
    path = sorted((cifar10.write_folders(tmp_path) / "train" / "ship").iterdir())[1]
    path.write_bytes(image)
    assert error_line(tmp_path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("item", [None, {"bytes": None, "path": "a.png"}])
def test_parquet_row_without_an_image(item: Any, tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("test*"))
    items = [{"bytes": encoded(image), "path": "x"} for image in TEST.raw]
    items[5] = item
    write_table(path, img=items, label=TEST.labels)
    assert error_line(tmp_path) == f"{path}: row 5 has no image bytes"


@pytest.mark.parametrize("column", [[{"path": "a.png"}], [3.5], ["a.png"]])
def test_parquet_column_of_another_kind(column: list[Any], tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("test*"))
    write_table(path, img=column, label=[0])
    assert error_line(tmp_path) == f"{path}: row 0 has no image bytes"


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("test*"))
    column = pyarrow.array([encoded(TEST.raw[0])])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column, pyarrow.array([0])], ["img", "img", "label"]), path)
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete Parquet file (")


def test_parquet_text_that_is_not_utf_8(tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("test*"))
    text = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"img": text, "label": [0]}), path)
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete Parquet file (")


@pytest.mark.parametrize("label", [10, -1, None])
def test_label_out_of_range_in_parquet(label: int | None, tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("train*"))
    write_table(path, img=[encoded(image) for image in TRAIN.raw], label=[*TRAIN.labels[:39], label])
    assert error_line(tmp_path) == f"{path}: label {label} in row 39 is not a whole number from 0 to 9"


def test_label_out_of_range_in_a_batch(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps(cifar10.batch_content(Part(TEST.raw, [*TEST.labels[:3], 12, *TEST.labels[4:]])), protocol=2))
    assert error_line(tmp_path) == f"{path}: label 12 in row 3 is not a whole number from 0 to 9"


@pytest.mark.parametrize(
    "change",
    [
        {b"data": TEST.raw.reshape(-1, 3072)[:, :-1]},
        {b"data": TEST.raw.reshape(-1, 3072).astype(np.float32)},
        {b"data": None},
        {b"labels": 3},
        {b"labels": ["a"]},
        {b"labels": np.ones(20)},
        {b"labels": np.int64(3)},
    ],
)
def test_batch_of_another_shape_or_type(change: dict[bytes, Any], tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps(cifar10.batch_content(TEST) | change, protocol=2))
    assert error_line(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


@pytest.mark.parametrize("content", [{b"fine_labels": [1]}, [1, 2], 5])
def test_pickle_of_something_else(content: Any, tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert error_line(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


def test_labels_and_images_differ_in_number(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(cifar10.batch_content(Part(TRAIN.raw[:8], TRAIN.labels[:7])), protocol=2))
    assert error_line(tmp_path) == f"{path}: 8 images and 7 labels"


def test_the_message_names_what_is_wrong_in_a_batch(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    for change, message in [
        ({b"labels": 3}, "an array or a list is needed, not int"),
        ({b"data": [1]}, "int64 data of shape (1,), not uint8"),
    ]:
        path.write_bytes(pickle.dumps(cifar10.batch_content(TEST) | change, protocol=2))
        assert message in error_line(tmp_path)
    path.write_bytes(pickle.dumps({b"data": 1}, protocol=2))
    assert error_line(tmp_path) == f"{path}: not a CIFAR-10 batch (it has no labels)"


ACCEPTED = "give cifar-10-batches-py (folder), cifar-10-python.tar.gz, train*.parquet"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": TEST.raw, "y": TEST.labels}, "no x_train and y_train (there are x, y); " + ACCEPTED),
        (
            {"x_train": TRAIN.raw, "y_train": TRAIN.labels, "train_images": TRAIN.raw, "train_labels": [0]},
            "both x_train and train_",
        ),
        ({"x_train": TRAIN.raw / 255, "y_train": TRAIN.labels}, "x_train: float64 of shape (40, 3, 32, 32); needed is uint8 of"),
        (
            {"x_train": TRAIN.raw[:, :, 1:], "y_train": TRAIN.labels},
            "uint8 of shape (40, 3, 31, 32); needed is uint8 of",
        ),
        ({"x_train": TRAIN.raw, "y_train": np.eye(40)}, "y_train: float64 of shape (40, 40); needed are integers of shape (n,)"),
        ({"x_train": TRAIN.raw, "y_train": TRAIN.labels[1:]}, "40 images and 39 labels"),
        ({"x_train": TRAIN.raw, "y_train": [10] * 40}, "label 10 in row 0 is not a whole number from 0 to 9"),
    ],
)
def test_arrays_of_something_else(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    for path in (tmp_path, tmp_path / "mine.npz"):
        assert message in error_line(path)


def test_a_single_array_is_not_a_data_set(tmp_path: Path) -> None:
    np.save(tmp_path / "cifar10.1_v6_data.npy", TEST.raw)
    assert error_line(tmp_path / "cifar10.1_v6_data.npy").endswith("contains x_train.npy, y_train.npy, x_test.npy and y_test.npy")
    assert ACCEPTED in error_line(tmp_path)


def test_one_set_of_parquet_files_is_not_counted_twice(tmp_path: Path) -> None:
    cifar10.write_parquet(tmp_path / "data"), cifar10.write_parquet(tmp_path / "plain_text")
    assert "two sets of files for the train split, which would be counted together" in error_line(tmp_path)


def test_two_batches_of_one_name_in_an_archive(tmp_path: Path) -> None:
    folder = cifar10.write_batches(tmp_path)
    with tarfile.open(tmp_path / "mine.tar", "w") as archive:
        archive.add(folder, "a"), archive.add(folder, "b")
    assert "contains two files data_batch_1; keep one of them" in error_line(tmp_path / "mine.tar")


@pytest.mark.parametrize("form", ["batches", "png folders"])
def test_permission_denied(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = cifar10.LOSSLESS[form](tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    text = error_line(path)
    assert text.startswith(str(path) + "/")
    assert text.endswith(": cannot be read (Permission denied)")


def test_permission_denied_on_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = cifar10.write_tar(tmp_path)
    monkeypatch.setattr(tarfile, "open", refuse)
    assert error_line(path) == f"{path}: cannot be read (Permission denied)"


# Hostile files


def test_bombs_in_an_archive_are_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.size = 30 * 2**20
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    assert "unpacks to more than" in error_line(tmp_path)


def test_an_archive_of_large_batches_is_read(tmp_path: Path) -> None:
    """Larger than a tar's header may be, as all real ones are."""
    folder = cifar10.write_batches(tmp_path)
    content = cifar10.batch_content(Part(np.tile(TEST.raw, (30, 1, 1, 1)), TEST.labels * 30))
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    assert (folder / "test_batch").stat().st_size > 2**20
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", folder)
    assert len(load_dataset(DataConfig(data_dir=str(path))).test) == 600


def test_a_pipe_instead_of_a_batch_is_not_waited_for(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    path.unlink()
    os.mkfifo(path)
    assert error_line(tmp_path) == f"{path}: not a plain file"


def test_a_batch_that_is_too_large(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    with path.open("wb") as file:
        file.truncate(2**33)  # takes no room on the disk
    assert error_line(tmp_path) == f"{path}: has 8,589,934,592 bytes; at most 536,870,912 are read"
