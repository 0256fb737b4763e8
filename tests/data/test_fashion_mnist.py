from importlib.resources import files

import numpy as np
import pytest
import torch

from advmoe.config import DataConfig
from advmoe.data import Images, Splits, fashion_mnist, load_dataset

SIZES = {"train": 6000, "val": 300, "test": 1000}
EMBEDDED = files("advmoe.data").joinpath("embedded")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset(DataConfig(dataset="fashion-mnist"))


def contents(images: Images) -> list[bytes]:
    return [image.tobytes() for image in images.raw.numpy()]


@pytest.mark.parametrize("part", SIZES)
def test_shapes_and_types(splits: Splits, part: str) -> None:
    images = getattr(splits, part)
    assert images.raw.shape == (SIZES[part], 1, 28, 28)
    assert images.raw.dtype == torch.uint8
    assert images.labels.dtype == torch.int64


@pytest.mark.parametrize("part", SIZES)
def test_classes_are_balanced(splits: Splits, part: str) -> None:
    assert torch.bincount(getattr(splits, part).labels).tolist() == [SIZES[part] // 10] * 10


def test_no_image_occurs_twice_in_or_across_splits(splits: Splits) -> None:
    everything = [content for part in SIZES for content in contents(getattr(splits, part))]
    assert len(set(everything)) == len(everything) == sum(SIZES.values())


def test_classes_are_mixed_in_every_split(splits: Splits) -> None:
    for part in SIZES:
        assert len(getattr(splits, part).labels[:60].unique()) >= 8


def test_classes_differ_as_their_names_say(splits: Splits) -> None:
    ink = {name: splits.train.pixels()[splits.train.labels == label].mean() for label, name in enumerate(splits.spec.classes)}
    assert ink["sandal"] < ink["trouser"] < ink["coat"]
    assert max(ink, key=ink.__getitem__) in {"pullover", "coat"}


def test_mean_and_deviation_are_those_of_the_images(splits: Splits) -> None:
    pixels = splits.train.pixels()
    assert pixels.mean().item() == pytest.approx(fashion_mnist.SPEC.mean[0], abs=0.005)
    assert pixels.std().item() == pytest.approx(fashion_mnist.SPEC.std[0], abs=0.005)


def test_file_is_small_and_holds_only_the_splits() -> None:
    with EMBEDDED.joinpath("fashion-mnist.npz").open("rb") as file, np.load(file) as arrays:
        assert set(arrays.files) == {f"{part}_{what}" for part in SIZES for what in ("images", "labels")}
    assert len(EMBEDDED.joinpath("fashion-mnist.npz").read_bytes()) < 4e6


def test_the_licence_is_beside_the_file() -> None:
    notice = EMBEDDED.joinpath("LICENSE.fashion-mnist").read_text()
    assert "MIT License" in notice
    assert "Zalando" in notice
    assert "The above copyright notice and this permission notice shall be included" in " ".join(notice.split())


def test_limits_are_balanced_and_do_not_change_the_fingerprint(splits: Splits) -> None:
    small = load_dataset(DataConfig(dataset="fashion-mnist", limit_train=40, limit_test=20))
    assert torch.bincount(small.train.labels).tolist() == [4] * 10
    assert torch.bincount(small.test.labels).tolist() == [2] * 10
    assert small.fingerprint == splits.fingerprint


def test_a_data_dir_that_is_not_read_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_dataset(DataConfig(dataset="fashion-mnist", data_dir="my/images", limit_train=40, limit_test=20))
    assert "my/images: is not read" in caplog.text


def test_limited_images_are_of_the_full_split(splits: Splits) -> None:
    small = load_dataset(DataConfig(dataset="fashion-mnist", limit_train=40))
    full = dict(zip(contents(splits.train), splits.train.labels.tolist(), strict=True))
    assert [full[content] for content in contents(small.train)] == small.train.labels.tolist()


def test_few_training_images_come_with_few_validation_images() -> None:
    splits = load_dataset(DataConfig(dataset="fashion-mnist", limit_train=256))
    assert (len(splits.train), len(splits.val)) == (256, 64)
    larger = load_dataset(DataConfig(dataset="fashion-mnist", limit_train=2000))
    assert len(larger.val) == 300
