import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from cifar_files import blocky, encoded, lossless, write_archive, write_class_folders, write_pickles, write_table

from advmoe.config import DataConfig
from advmoe.data import DATASETS, Splits, count_images, load_dataset
from advmoe.data.cifar import CIFAR100
from advmoe.data.images import Source
from advmoe.errors import UserError

CLASSES = CIFAR100.spec.classes
PARTS = {"train": blocky(100, 2, seed=1), "test": blocky(100, 1, seed=2)}


def batch_content(name: str) -> dict[bytes, Any]:
    raw, labels = PARTS[name]
    coarse = [label // 5 for label in labels]
    return {b"data": raw.reshape(-1, 3072), b"fine_labels": labels, b"coarse_labels": coarse, b"batch_label": b"tiny"}


def write_batches(folder: Path) -> Path:
    contents = {"meta": {b"fine_label_names": [name.encode() for name in CLASSES]}, **{name: batch_content(name) for name in PARTS}}
    return write_pickles(folder / "cifar-100-python", contents)


def write_tar(folder: Path) -> Path:
    return write_archive(folder / "cifar-100-python.tar.gz", write_batches(folder))


def write_parquet(folder: Path, column: str = "fine_label", kind: str = "PNG") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (raw, labels) in PARTS.items():
        columns = {column: labels, "coarse_label": [label // 5 for label in labels]}
        images = [{"bytes": encoded(image, kind), "path": None} for image in raw]
        write_table(folder / f"{name}-00000-of-00001.parquet", img=images, **columns)
    return folder


def write_folders(folder: Path, kind: str = "PNG") -> Path:
    return write_class_folders(folder, PARTS, CLASSES, kind)


LOSSLESS = lossless(write_batches, write_tar, write_parquet, write_folders)
LOSSLESS["parquet with label"] = lambda folder: write_parquet(folder, "label")
FIELDS = {"dataset": "cifar100", "validation_share": 0.5}
error_line = partial(damage.error_line, **FIELDS)


def load(path: Path) -> Splits:
    return load_dataset(DataConfig(data_dir=str(path), **FIELDS))


def parts(splits: Splits) -> tuple[Source, Source, Source]:
    return splits.train, splits.val, splits.test


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load(write_batches(tmp_path_factory.mktemp("expected")))


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_forms_give_the_same_data(form: str, tmp_path: Path, expected: Splits) -> None:
    path = LOSSLESS[form](tmp_path)
    splits = load(path)
    assert (splits.name, splits.fingerprint, splits.spec) == ("cifar100", expected.fingerprint, CIFAR100.spec)
    assert torch.equal(splits.val.labels, expected.val.labels)
    for limits in ({}, {"limit_train": 30, "limit_test": 7}):
        config = DataConfig(data_dir=str(path), **FIELDS, **limits)
        assert count_images(config) == tuple(map(len, parts(load_dataset(config))))


def test_images_keep_their_pixels_and_fine_labels(expected: Splits) -> None:
    images = {}
    for split in (expected.train, expected.val):
        rows = split[torch.arange(len(split))]
        images |= {image.numpy().tobytes(): label for image, label in zip(rows.raw, rows.labels.tolist(), strict=True)}
    assert images == {image.tobytes(): label for image, label in zip(*PARTS["train"], strict=True)}
    assert torch.bincount(expected.test.labels).tolist() == [1] * 100


@pytest.mark.parametrize("write", [lambda folder: write_parquet(folder, kind="JPEG"), lambda folder: write_folders(folder, "JPEG")])
def test_jpeg_forms_are_named_so(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert load(write(tmp_path)).name == "cifar100-jpeg"


def test_classes_are_the_official_ones_in_their_order() -> None:
    spec = DATASETS["cifar100"].spec(DataConfig(dataset="cifar100"))
    assert len(spec.classes) == 100
    assert list(spec.classes) == sorted(set(spec.classes))
    known = {0: "apple", 1: "aquarium_fish", 39: "keyboard", 41: "lawn_mower", 58: "pickup_truck", 83: "sweet_pepper", 99: "worm"}
    assert {number: spec.classes[number] for number in known} == known


# What is missing, damaged or another data set


def test_no_data_dir_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cifar100 needs --data-dir: a path that contains cifar-100-python \(folder\), "):
        load_dataset(DataConfig(dataset="cifar100"))
    assert error_line(tmp_path).startswith(f"{tmp_path}: contains none of cifar-100-python (folder), cifar-100-python.tar.gz, ")


@pytest.mark.parametrize("label", [100, -1])
def test_label_out_of_range(label: int, tmp_path: Path) -> None:
    path, content = write_batches(tmp_path) / "test", batch_content("test")
    path.write_bytes(pickle.dumps(content | {b"fine_labels": [label, *content[b"fine_labels"][1:]]}, protocol=2))
    assert error_line(tmp_path) == f"{path}: label {label} in row 0 is not a whole number from 0 to 99"


def test_wrong_columns(tmp_path: Path) -> None:
    path = next(write_parquet(tmp_path, "other").glob("train*"))
    assert error_line(tmp_path) == f"{path}: needs columns img and fine_label, has img, other, coarse_label"


def test_superclasses_are_not_mistaken_for_classes(tmp_path: Path) -> None:
    raw, labels = PARTS["train"]
    images = [encoded(image) for image in raw]
    for name in ("train", "test"):
        write_table(tmp_path / f"{name}.parquet", image=images, label=[label // 5 for label in labels])
    assert error_line(tmp_path) == f"{tmp_path}: no training image of class 20 (chair) of CIFAR-100"


def test_the_two_data_sets_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    assert "contains none of cifar-10-batches-py" in error_line(write_batches(tmp_path / "a").parent, dataset="cifar10")
    assert error_line(write_parquet(tmp_path / "b"), dataset="cifar10").endswith(
        "needs columns img and label, has img, fine_label, coarse_label"
    )
    assert error_line(write_folders(tmp_path / "c"), dataset="cifar10").endswith("no folder for class airplane")
