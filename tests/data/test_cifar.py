import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset
from advmoe.data.cifar import CIFAR10
from advmoe.errors import UserError

CLASSES = CIFAR10.spec.classes
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


class Part(NamedTuple):
    """Pictures [n, 3, 32, 32] uint8 and labels."""

    images: np.ndarray
    labels: list[int]


def tiny(each: int, seed: int) -> Part:
    """Blocky random pictures, `each` of every class, in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(10), each)).tolist()
    images = random.integers(0, 256, (len(labels), 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    return Part(images, labels)


TRAIN, TEST = tiny(4, seed=1), tiny(2, seed=2)


def encoded(image: np.ndarray, kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image.transpose(1, 2, 0)).convert(mode)
    picture = picture if size == (32, 32) else picture.resize(size)
    picture.save(buffer, kind, **({"quality": 75} if kind == "JPEG" else {}))
    return buffer.getvalue()


def batch_content(part: Part) -> dict[bytes, Any]:
    return {b"batch_label": b"tiny", b"labels": part.labels, b"data": part.images.reshape(-1, 3072), b"filenames": [b"a.png"]}


def write_batches(folder: Path) -> Path:
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True)
    for number, name in enumerate(BATCHES):
        rows = slice(8 * number, 8 * number + 8)
        (target / name).write_bytes(pickle.dumps(batch_content(Part(TRAIN.images[rows], TRAIN.labels[rows])), protocol=2))
    (target / "test_batch").write_bytes(pickle.dumps(batch_content(TEST), protocol=2))
    (target / "batches.meta").write_bytes(pickle.dumps({b"label_names": list(CLASSES)}, protocol=2))
    return target


def write_tar(folder: Path) -> Path:
    source = write_batches(folder / "unpacked")
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(source, "cifar-10-batches-py")
    shutil.rmtree(folder / "unpacked")
    return folder / "cifar-10-python.tar.gz"


def write_parquet(folder: Path, kind: str = "PNG") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", TRAIN), ("test", TEST)):
        pictures = [{"bytes": encoded(image, kind), "path": f"{row}.png"} for row, image in enumerate(part.images)]
        write_table(folder / f"{name}-00000-of-00001.parquet", pictures, part.labels)
    return folder


def write_table(path: Path, pictures: list[Any], labels: list[Any], columns: tuple[str, str] = ("img", "label")) -> None:
    pyarrow.parquet.write_table(pa.table(dict(zip(columns, (pictures, labels), strict=True))), path)


def write_folders(folder: Path, kind: str = "PNG") -> Path:
    for name, part in (("train", TRAIN), ("test", TEST)):
        for row, (image, label) in enumerate(zip(*part, strict=True)):
            target = folder / name / CLASSES[label]
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{row:03d}.{kind.lower()}").write_bytes(encoded(image, kind))
    return folder


LOSSLESS: dict[str, Callable[[Path], Path]] = {
    "batches": write_batches,
    "folder of batches": lambda folder: write_batches(folder).parent,
    "tar.gz": write_tar,
    "folder of tar.gz": lambda folder: write_tar(folder).parent,
    "parquet": write_parquet,
    "parquet in a folder": lambda folder: write_parquet(folder / "plain_text").parent,
    "png folders": write_folders,
}


def load(place: Path, **fields: Any) -> Splits:
    return load_dataset(DataConfig(data_dir=str(place), **{"validation_share": 0.25} | fields))


def complaint(place: Path | None, **fields: Any) -> str:
    """The one line in which loading fails."""
    with pytest.raises(UserError) as caught:
        load_dataset(DataConfig(data_dir=None if place is None else str(place), **fields))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def contents(splits: Splits) -> dict[bytes, int]:
    """Label by pixels, over train and validation part."""
    parts = (splits.train, splits.val)
    return {image.numpy().tobytes(): int(label) for part in parts for image, label in zip(part.images, part.labels, strict=True)}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load(write_batches(tmp_path_factory.mktemp("wanted")))


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_forms_give_the_same_data(form: str, tmp_path: Path, wanted: Splits) -> None:
    splits = load(LOSSLESS[form](tmp_path))
    assert (splits.name, splits.fingerprint) == ("cifar10", wanted.fingerprint)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(splits, part).images, getattr(wanted, part).images)
        assert torch.equal(getattr(splits, part).labels, getattr(wanted, part).labels)


def test_pictures_keep_their_pixels_and_labels(wanted: Splits) -> None:
    assert contents(wanted) == {image.tobytes(): label for image, label in zip(*TRAIN, strict=True)}
    test = {image.numpy().tobytes() for image in wanted.test.images}
    assert test == {image.tobytes() for image in TEST.images}


def test_held_out_part_is_stratified(wanted: Splits) -> None:
    assert torch.bincount(wanted.val.labels).tolist() == [1] * 10
    assert torch.bincount(wanted.train.labels).tolist() == [3] * 10


def test_limits(tmp_path: Path, wanted: Splits) -> None:
    splits = load(write_batches(tmp_path), limit_train=20, limit_test=10)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [20, 10, 10]
    assert torch.bincount(splits.train.labels).tolist() == [2] * 10
    assert splits.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("write", [write_parquet, write_folders])
def test_jpeg_forms_are_named_so(write: Callable[[Path, str], Path], tmp_path: Path, wanted: Splits) -> None:
    splits = load(write(tmp_path, "JPEG"))
    assert splits.name == "cifar10-jpeg"
    assert splits.fingerprint != wanted.fingerprint


def test_jpeg_forms_give_the_same_data(tmp_path: Path) -> None:
    parquet, folders = load(write_parquet(tmp_path / "a", "JPEG")), load(write_folders(tmp_path / "b", "JPEG"))
    assert parquet.fingerprint == folders.fingerprint


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_jpeg_in_either_part_names_the_data(part: str, tmp_path: Path) -> None:
    picture = next((write_folders(tmp_path) / part / "cat").iterdir())
    picture.write_bytes(encoded(TRAIN.images[0], "JPEG"))
    assert load(tmp_path).name == "cifar10-jpeg"


def test_parquet_shards_and_plain_bytes(tmp_path: Path, wanted: Splits) -> None:
    for shard in range(4):
        rows = slice(10 * shard, 10 * shard + 10)
        items = [encoded(image, "PNG") for image in TRAIN.images[rows]]
        write_table(tmp_path / f"train-{shard}.parquet", items, TRAIN.labels[rows], ("image", "label"))
    write_table(tmp_path / "test.parquet", [encoded(image, "PNG") for image in TEST.images], TEST.labels)
    assert load(tmp_path).fingerprint == wanted.fingerprint


def test_python_3_pickle_is_read(tmp_path: Path, wanted: Splits) -> None:
    place = write_batches(tmp_path)
    for path in place.glob("data_batch_*"):
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=4))
    assert load(place).fingerprint == wanted.fingerprint


def test_pickle_of_old_numpy_is_read(tmp_path: Path, wanted: Splits) -> None:
    place = write_batches(tmp_path)
    for path in place.glob("*_batch*"):
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
        assert b"cnumpy.core.multiarray" in path.read_bytes()
    assert load(place).fingerprint == wanted.fingerprint


def test_hidden_files_beside_pictures_are_passed_over(tmp_path: Path, wanted: Splits) -> None:
    (write_folders(tmp_path) / "train" / "cat" / ".DS_Store").write_bytes(b"mac")
    assert load(tmp_path).fingerprint == wanted.fingerprint


# What is missing


def test_no_data_dir() -> None:
    assert "needs --data-dir" in complaint(None)


def test_nonexistent_path(tmp_path: Path) -> None:
    assert complaint(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"


def test_empty_folder(tmp_path: Path) -> None:
    assert complaint(tmp_path).startswith(f"{tmp_path}: holds none of cifar-10-batches-py")


@pytest.mark.parametrize("name", [*BATCHES, "test_batch"])
def test_missing_batch(name: str, tmp_path: Path) -> None:
    path = write_batches(tmp_path) / name
    path.unlink()
    assert complaint(tmp_path) == f"{path}: cannot be read (No such file or directory)"


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_parquet_part(part: str, tmp_path: Path) -> None:
    next(write_parquet(tmp_path).glob(f"{part}*")).unlink()
    assert complaint(tmp_path) == f"{tmp_path}: holds no {part}*.parquet"


def test_one_parquet_file_is_not_enough(tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("train*"))
    assert complaint(path).startswith(f"{path}: is one file; give the folder")


def test_missing_batch_in_tar(tmp_path: Path) -> None:
    source = write_batches(tmp_path)
    (source / "data_batch_3").unlink()
    path = tmp_path / "mine.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, "cifar-10-batches-py")
    assert complaint(path) == f"{path}: holds no file cifar-10-batches-py/data_batch_3"


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_class_folder(part: str, tmp_path: Path) -> None:
    shutil.rmtree(write_folders(tmp_path) / part / "frog")
    assert complaint(tmp_path) == f"{tmp_path / part}: no folder for class frog"


def test_empty_class_folder(tmp_path: Path) -> None:
    for path in (write_folders(tmp_path) / "train" / "frog").iterdir():
        path.unlink()
    assert complaint(tmp_path) == f"{tmp_path / 'train' / 'frog'}: holds no picture"


def test_missing_test_folder(tmp_path: Path) -> None:
    shutil.rmtree(write_folders(tmp_path) / "test")
    assert complaint(tmp_path) == f"{tmp_path / 'test'}: no such folder"


def test_too_few_pictures_to_hold_out(tmp_path: Path) -> None:
    for path in sorted((write_folders(tmp_path) / "train" / "frog").iterdir())[1:]:
        path.unlink()
    assert "class 6 has 1 training picture" in complaint(tmp_path)


# What is damaged


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_pickle(share: float, tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "data_batch_2"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert complaint(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


@pytest.mark.parametrize("cut", [0, 1, 9, 200, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, -9, -4, -1])
def test_truncated_tar(cut: float, tmp_path: Path) -> None:
    path = write_tar(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    assert complaint(tmp_path).startswith(f"{path}: not a whole tar archive (")


@pytest.mark.parametrize("place", [0.2, 0.4, 0.6, 0.8])
def test_tar_with_a_flipped_bit(place: float, tmp_path: Path) -> None:
    path = write_tar(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    assert complaint(path).startswith(f"{path}: ")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_plain_tar(share: float, tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(write_batches(tmp_path), "cifar-10-batches-py")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert complaint(path).startswith(f"{path}: ")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n" * 200)
    assert complaint(path).startswith(f"{path}: not a whole tar archive")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_parquet(share: float, tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("test*"))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert complaint(tmp_path).startswith(f"{path}: not a whole Parquet file (")


@pytest.mark.parametrize("columns", [("picture", "label"), ("img", "fine_label")])
def test_wrong_columns(columns: tuple[str, str], tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("train*"))
    write_table(path, [b"x"], [0], columns)
    assert complaint(tmp_path) == f"{path}: needs columns img and label, has {', '.join(columns)}"


BAD_PICTURES = {
    "empty": (b"", "not a picture that can be decoded"),
    "text": (b"hello, no picture", "not a picture that can be decoded"),
    "cut png": (encoded(TRAIN.images[0], "PNG")[:150], "not a picture that can be decoded"),
    "cut jpeg": (encoded(TRAIN.images[0], "JPEG")[:400], "not a picture that can be decoded"),
    "header alone": (encoded(TRAIN.images[0], "PNG")[:8], "not a picture that can be decoded"),
    "large": (encoded(TRAIN.images[0], "PNG", size=(33, 32)), "the picture is 33 x 32, not 32 x 32"),
    "small": (encoded(TRAIN.images[0], "PNG", size=(28, 28)), "the picture is 28 x 28, not 32 x 32"),
    "postscript": (encoded(TRAIN.images[0], "EPS"), "not a picture that can be decoded (none of PNG, "),
}


def huge_png(side: int) -> bytes:
    """A small file that says it holds side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


BAD_PICTURES["bomb"] = (huge_png(12_000), "the picture is 12000 x 12000, not 32 x 32")
BAD_PICTURES["larger bomb"] = (huge_png(60_000), "not a picture that can be decoded (Image size")


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.filterwarnings("error")
def test_bad_picture_in_parquet_is_named_by_its_row(name: str, tmp_path: Path) -> None:
    picture, message = BAD_PICTURES[name]
    path = next(write_parquet(tmp_path).glob("train*"))
    items = [{"bytes": encoded(image, "PNG"), "path": None} for image in TRAIN.images]
    items[17] = {"bytes": picture, "path": None}
    write_table(path, items, TRAIN.labels)
    assert complaint(tmp_path).startswith(f"{path}: row 17: {message}")


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.filterwarnings("error")
def test_bad_picture_in_a_folder_is_named_by_its_path(name: str, tmp_path: Path) -> None:
    picture, message = BAD_PICTURES[name]
    path = sorted((write_folders(tmp_path) / "train" / "ship").iterdir())[1]
    path.write_bytes(picture)
    assert complaint(tmp_path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("item", [None, {"bytes": None, "path": "a.png"}])
def test_parquet_row_without_a_picture(item: Any, tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("test*"))
    items = [{"bytes": encoded(image, "PNG"), "path": "x"} for image in TEST.images]
    items[5] = item
    write_table(path, items, TEST.labels)
    assert complaint(tmp_path) == f"{path}: row 5 holds no picture bytes"


@pytest.mark.parametrize("column", [[{"path": "a.png"}], [3.5], ["a.png"]])
def test_parquet_column_of_another_kind(column: list[Any], tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("test*"))
    write_table(path, column, [0])
    assert complaint(tmp_path) == f"{path}: row 0 holds no picture bytes"


@pytest.mark.parametrize("label", [10, -1, None])
def test_label_out_of_range_in_parquet(label: int | None, tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path).glob("train*"))
    labels = [*TRAIN.labels[:39], label]
    write_table(path, [encoded(image, "PNG") for image in TRAIN.images], labels)
    assert complaint(tmp_path) == f"{path}: label {label} in row 39 is not a whole number from 0 to 9"


def test_label_out_of_range_in_a_batch(tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps(batch_content(Part(TEST.images, [*TEST.labels[:3], 12, *TEST.labels[4:]])), protocol=2))
    assert complaint(tmp_path) == f"{path}: label 12 in row 3 is not a whole number from 0 to 9"


@pytest.mark.parametrize(
    "change",
    [
        {b"data": TEST.images.reshape(-1, 3072)[:, :-1]},
        {b"data": TEST.images.reshape(-1, 3072).astype(np.float32)},
        {b"data": None},
        {b"labels": 3},
    ],
)
def test_batch_of_another_shape_or_type(change: dict[bytes, Any], tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps(batch_content(TEST) | change, protocol=2))
    assert complaint(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


@pytest.mark.parametrize("content", [{b"fine_labels": [1]}, [1, 2], 5])
def test_pickle_of_something_else(content: Any, tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert complaint(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (")


def test_labels_and_pictures_differ_in_number(tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(batch_content(Part(TRAIN.images[:8], TRAIN.labels[:7])), protocol=2))
    assert complaint(tmp_path) == f"{path}: 8 pictures and 7 labels"


class Shell:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["alone", "in labels", "in an object array"])
def test_code_in_a_pickle_does_not_run(where: str, protocol: int, tmp_path: Path) -> None:
    shell, mark = Shell(f"touch {tmp_path / 'ran'}"), tmp_path / "ran"
    content: Any = {
        "alone": shell,
        "in labels": batch_content(TEST) | {b"labels": [shell]},
        "in an object array": batch_content(TEST) | {b"data": np.array([shell], dtype=object)},
    }[where]
    path = write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert complaint(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (UnpicklingError: it asks for posix.system")
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


def test_modules_named_by_a_pickle_are_not_imported(tmp_path: Path) -> None:
    path = write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(b"cnumpy.f2py.__main__\ndtype\n.")
    assert "it asks for numpy.f2py.__main__.dtype" in complaint(tmp_path)


@pytest.mark.parametrize("form", ["batches", "png folders"])
def test_permission_denied(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    place = LOSSLESS[form](tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    text = complaint(place)
    assert text.startswith(str(place) + "/")
    assert text.endswith(": cannot be read (Permission denied)")


def test_permission_denied_on_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: Path, *rest: Any) -> None:
        raise PermissionError(13, "Permission denied", str(name))

    path = write_tar(tmp_path)
    monkeypatch.setattr(tarfile, "open", refuse)
    assert complaint(path) == f"{path}: cannot be read (Permission denied)"


# Pictures in other colours


def colour_variant(image: np.ndarray, mode: str) -> tuple[bytes, np.ndarray]:
    """An encoded picture in `mode`, and its pixels in RGB."""
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", mode)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.mode == mode
        return data, np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    path = sorted((write_folders(tmp_path) / "train" / "bird").iterdir())[0]
    data, pixels = colour_variant(TRAIN.images[0], mode)
    path.write_bytes(data)
    found = contents(load(tmp_path))
    assert found[pixels.tobytes()] == CLASSES.index("bird")


def test_a_grey_picture_has_three_equal_channels(tmp_path: Path) -> None:
    path = sorted((write_folders(tmp_path) / "test" / "bird").iterdir())[0]
    path.write_bytes(encoded(TRAIN.images[0], "PNG", "L"))
    test = load(tmp_path).test.images
    assert sum(bool((image[0] == image[1]).all() and (image[0] == image[2]).all()) for image in test) == 1


@pytest.mark.parametrize("member", ["../../evil", "/etc/evil"])
def test_a_tar_member_that_points_outside_is_named(member, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(member))
    with pytest.raises(UserError, match=f"member {member} points outside the archive"):
        load_dataset(DataConfig(dataset="cifar10", data_dir=str(path)))
