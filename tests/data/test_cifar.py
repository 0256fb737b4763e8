import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import pytest
import torch
from cifar10 import CLASSES, TEST, TRAIN
from cifar_files import encoded, write_archive, write_table
from damage import error_line
from PIL import Image

from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset


def load(path: Path, **fields: Any) -> Splits:
    return load_dataset(DataConfig(data_dir=str(path), **{"validation_share": 0.25} | fields))


def contents(splits: Splits) -> dict[bytes, int]:
    """Label by pixels, over train and validation part."""
    parts = (splits.train, splits.val)
    return {image.numpy().tobytes(): int(label) for part in parts for image, label in zip(part.raw, part.labels, strict=True)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load(cifar10.write_batches(tmp_path_factory.mktemp("expected")))


@pytest.mark.parametrize("form", cifar10.LOSSLESS)
def test_lossless_forms_give_the_same_data(form: str, tmp_path: Path, expected: Splits) -> None:
    splits = load(cifar10.LOSSLESS[form](tmp_path))
    assert (splits.name, splits.fingerprint) == ("cifar10", expected.fingerprint)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(splits, part).raw, getattr(expected, part).raw)
        assert torch.equal(getattr(splits, part).labels, getattr(expected, part).labels)


def test_images_keep_their_pixels_and_labels(expected: Splits) -> None:
    assert contents(expected) == {image.tobytes(): label for image, label in zip(*TRAIN, strict=True)}
    test = {image.numpy().tobytes() for image in expected.test.raw}
    assert test == {image.tobytes() for image in TEST.raw}


def test_held_out_split_is_stratified(expected: Splits) -> None:
    assert torch.bincount(expected.val.labels).tolist() == [1] * 10
    assert torch.bincount(expected.train.labels).tolist() == [3] * 10


def test_limits(tmp_path: Path, expected: Splits) -> None:
    splits = load(cifar10.write_batches(tmp_path), limit_train=20, limit_test=10)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [20, 10, 10]
    assert torch.bincount(splits.train.labels).tolist() == [2] * 10
    assert splits.fingerprint == expected.fingerprint


@pytest.mark.parametrize("write", [cifar10.write_parquet, cifar10.write_folders])
def test_jpeg_forms_are_named_so(write: Callable[[Path, str], Path], tmp_path: Path, expected: Splits) -> None:
    splits = load(write(tmp_path, "JPEG"))
    assert splits.name == "cifar10-jpeg"
    assert splits.fingerprint != expected.fingerprint


def test_jpeg_forms_give_the_same_data(tmp_path: Path) -> None:
    parquet, folders = load(cifar10.write_parquet(tmp_path / "a", "JPEG")), load(cifar10.write_folders(tmp_path / "b", "JPEG"))
    assert parquet.fingerprint == folders.fingerprint


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_jpeg_in_either_split_names_the_data(part: str, tmp_path: Path) -> None:
    image = next((cifar10.write_folders(tmp_path) / part / "cat").iterdir())
    image.write_bytes(encoded(TRAIN.raw[0], "JPEG"))
    assert load(tmp_path).name == "cifar10-jpeg"


def test_parquet_shards_and_plain_bytes(tmp_path: Path, expected: Splits) -> None:
    for shard in range(4):
        rows = slice(10 * shard, 10 * shard + 10)
        items = [encoded(image) for image in TRAIN.raw[rows]]
        write_table(tmp_path / f"train-{shard}.parquet", image=items, label=TRAIN.labels[rows])
    write_table(tmp_path / "test.parquet", img=[encoded(image) for image in TEST.raw], label=TEST.labels)
    assert load(tmp_path).fingerprint == expected.fingerprint


BATCHES: dict[str, Callable[[dict[bytes, Any]], Any]] = {
    "keys as str": lambda batch: {key.decode(): value for key, value in batch.items()},
    "labels as an array": lambda batch: batch | {b"labels": np.array(batch[b"labels"])},
    "labels as an array of bytes": lambda batch: batch | {b"labels": np.array(batch[b"labels"], np.uint8)},
    "labels as a big-endian array": lambda batch: batch | {b"labels": np.array(batch[b"labels"], ">i2")},
    "labels as numpy's numbers": lambda batch: batch | {b"labels": [np.int64(label) for label in batch[b"labels"]]},
    "labels as a tuple": lambda batch: batch | {b"labels": tuple(batch[b"labels"])},
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("form", BATCHES)
def test_other_batches_are_read(form: str, protocol: int, tmp_path: Path, expected: Splits) -> None:
    folder = cifar10.write_batches(tmp_path)
    for path in folder.glob("*_batch*"):
        path.write_bytes(pickle.dumps(BATCHES[form](pickle.loads(path.read_bytes())), protocol=protocol))
    assert load(folder).fingerprint == expected.fingerprint


def test_pickle_of_old_numpy_is_read(tmp_path: Path, expected: Splits) -> None:
    folder = cifar10.write_batches(tmp_path)
    for path in folder.glob("*_batch*"):
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
        assert b"cnumpy.core.multiarray" in path.read_bytes()
    assert load(folder).fingerprint == expected.fingerprint


def test_hidden_files_beside_images_are_skipped(tmp_path: Path, expected: Splits) -> None:
    (cifar10.write_folders(tmp_path) / "train" / "cat" / ".DS_Store").write_bytes(b"mac")
    assert load(tmp_path).fingerprint == expected.fingerprint


def colour_variant(image: np.ndarray, mode: str) -> tuple[bytes, np.ndarray]:
    """An encoded image in `mode`, and its pixels in RGB."""
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", mode)
    with Image.open(io.BytesIO(data)) as file:
        assert file.mode == mode
        return data, np.asarray(file.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    path = sorted((cifar10.write_folders(tmp_path) / "train" / "bird").iterdir())[0]
    data, pixels = colour_variant(TRAIN.raw[0], mode)
    path.write_bytes(data)
    images = contents(load(tmp_path))
    assert images[pixels.tobytes()] == CLASSES.index("bird")


def test_a_grey_image_has_three_equal_channels(tmp_path: Path) -> None:
    path = sorted((cifar10.write_folders(tmp_path) / "test" / "bird").iterdir())[0]
    path.write_bytes(encoded(TRAIN.raw[0], "PNG", "L"))
    test = load(tmp_path).test.raw
    assert sum(bool((image[0] == image[1]).all() and (image[0] == image[2]).all()) for image in test) == 1


# What is missing


def test_no_data_dir() -> None:
    assert "needs --data-dir" in error_line(None)


def test_nonexistent_path(tmp_path: Path) -> None:
    assert error_line(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"


def test_empty_folder(tmp_path: Path) -> None:
    assert error_line(tmp_path).startswith(f"{tmp_path}: contains none of cifar-10-batches-py")


@pytest.mark.parametrize("name", [*cifar10.BATCHES, "test_batch"])
def test_missing_batch(name: str, tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / name
    path.unlink()
    assert error_line(tmp_path) == f"{path}: cannot be read (No such file or directory)"


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_parquet_split(part: str, tmp_path: Path) -> None:
    next(cifar10.write_parquet(tmp_path).glob(f"{part}*")).unlink()
    assert error_line(tmp_path) == f"{tmp_path}: contains no {part}*.parquet"


def test_one_parquet_file_is_not_enough(tmp_path: Path) -> None:
    path = next(cifar10.write_parquet(tmp_path).glob("train*"))
    assert error_line(path).startswith(f"{path}: is one file; give the folder")


def test_missing_batch_in_tar(tmp_path: Path) -> None:
    source = cifar10.write_batches(tmp_path)
    (source / "data_batch_3").unlink()
    path = write_archive(tmp_path / "mine.tar.gz", source)
    assert error_line(path) == f"{path}: contains no file cifar-10-batches-py/data_batch_3"


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_class_folder(part: str, tmp_path: Path) -> None:
    shutil.rmtree(cifar10.write_folders(tmp_path) / part / "frog")
    assert error_line(tmp_path) == f"{tmp_path / part}: no folder for class frog"


def test_empty_class_folder(tmp_path: Path) -> None:
    for path in (cifar10.write_folders(tmp_path) / "train" / "frog").iterdir():
        path.unlink()
    assert error_line(tmp_path) == f"{tmp_path / 'train' / 'frog'}: contains no image"


def test_missing_test_folder(tmp_path: Path) -> None:
    shutil.rmtree(cifar10.write_folders(tmp_path) / "test")
    assert error_line(tmp_path) == f"{tmp_path / 'test'}: no such folder"


def test_too_few_images_to_hold_out(tmp_path: Path) -> None:
    for path in sorted((cifar10.write_folders(tmp_path) / "train" / "frog").iterdir())[1:]:
        path.unlink()
    assert "class 6 has 1 training image" in error_line(tmp_path)
