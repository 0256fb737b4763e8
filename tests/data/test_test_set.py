"""Other test sets: arrays, corruptions, class folders, each with labels of the network's classes."""

import numpy as np
import pytest
from PIL import Image
from refusal import refusal

from advmoe.config import DataConfig
from advmoe.data import ImageSpec
from advmoe.data.test_set import ExtraTestSet

SPEC = ImageSpec(("cat", "dog"), (3, 6, 6), (0.5,) * 3, (0.25,) * 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) // 2 % 2


def load(path, *corruption, spec=SPEC, **data):
    return ExtraTestSet(path, *corruption).load(spec, DataConfig(**data))


def class_folders(path, classes=SPEC.classes, size=6):
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for row in range(3):
            Image.fromarray(IMAGES[number * 3 + row]).resize((size, size)).save(path / name / f"{row}.png")


@pytest.fixture
def corruptions(tmp_path):
    """Files like those of CIFAR-10-C: each has the five severities one after another."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "fog.npy", IMAGES)
    np.save(folder / "snow.npy", 255 - IMAGES)
    np.save(folder / "labels.npy", LABELS.astype(np.uint8))
    return folder


def test_each_severity_is_a_fifth_of_the_corruptions_file(corruptions):
    splits = load(corruptions, "fog", 3)
    assert splits.name == "CIFAR-10-C-fog-3"
    assert (splits.test.raw.numpy() == IMAGES[8:12].transpose(0, 3, 1, 2)).all()
    assert splits.test.labels.tolist() == LABELS[8:12].tolist()
    assert (len(splits.train), len(splits.val)) == (0, 0)
    assert len({load(corruptions, name, severity).fingerprint for name in ("fog", "snow") for severity in (1, 5)}) == 4
    assert load(corruptions, "fog", 3, limit_test=2).test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_other_severities_are_refused(corruptions, severity):
    assert refusal(load, corruptions, "fog", severity) == f"severity must be 1 to 5, not {severity}"


def test_missing_corruptions_and_labels(corruptions):
    assert refusal(load, corruptions, "fogg", 1) == f"{corruptions}: has no corruption 'fogg': did you mean fog?"
    assert "has no corruption 'labels'" in refusal(load, corruptions, "labels", 1)
    assert "choose one by --corruption and --severity" in refusal(load, corruptions)
    assert "give its folder, with --corruption fog and --severity" in refusal(load, corruptions / "fog.npy")
    np.save(corruptions / "fog.npy", IMAGES[:18])
    assert "fog.npy: 18 images and 20 labels" in refusal(load, corruptions, "fog", 1)
    np.save(corruptions / "labels.npy", LABELS[:18])
    assert "fog.npy: 18 images are not 5 severities of equal size" in refusal(load, corruptions, "fog", 1)
    (corruptions / "labels.npy").unlink()
    assert "fog.npy: has no labels; needed is labels.npy beside it" in refusal(load, corruptions, "fog", 1)


def test_data_beside_labels(tmp_path):
    path = tmp_path / "cifar10.1_v6_data.npy"
    np.save(path, IMAGES)
    assert refusal(load, path) == f"{path}: has no labels; needed is cifar10.1_v6_labels.npy beside it"
    np.save(tmp_path / "cifar10.1_v6_labels.npy", LABELS.astype(np.int32))
    splits = load(path)
    assert (splits.name, len(splits.test)) == ("cifar10.1_v6", 20)
    assert load(tmp_path).fingerprint == splits.fingerprint
    np.save(tmp_path / "cifar10.1_v4_data.npy", IMAGES)
    assert "holds several test sets; give one of cifar10.1_v4_data.npy, cifar10.1_v6_data.npy" in refusal(load, tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, :5], LABELS, "_data.npy: uint8 of shape (20, 5, 6, 3); needed is uint8 of shape (n, 6, 6, 3), (n, 3, 6, 6)"),
        (IMAGES / 255, LABELS, "_data.npy: float64 of shape (20, 6, 6, 3); needed is uint8"),
        (np.uint8(1), LABELS, "_data.npy: uint8 of shape (); needed is uint8"),
        (IMAGES, LABELS[:19], "20 images and 19 labels"),
        (IMAGES, LABELS + 1, "label 2 in row 2 is not a whole number from 0 to 1"),
        (IMAGES, np.array("cat"), "_labels.npy: <U3 of shape (); needed are integers"),
    ],
)
def test_arrays_of_other_shapes_and_classes(tmp_path, images, labels, message):
    np.save(tmp_path / "a_data.npy", images)
    np.save(tmp_path / "a_labels.npy", labels)
    assert message in refusal(load, tmp_path / "a_data.npy")


def test_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=IMAGES.transpose(0, 3, 1, 2), labels=LABELS[:, None])
    assert (load(path).test.raw.numpy() == IMAGES.transpose(0, 3, 1, 2)).all()
    np.savez(path, images=IMAGES)
    assert refusal(load, path) == f"{path}: has no images and labels, but images"


def test_class_folders_in_the_networks_order(tmp_path):
    class_folders(tmp_path / "mine")
    spec = ImageSpec(("dog", "cat"), (3, 6, 6), SPEC.mean, SPEC.std)
    splits = load(tmp_path / "mine", spec=spec)
    assert splits.name == "mine"
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (splits.test.raw[0].numpy() == IMAGES[3].transpose(2, 0, 1)).all()
    assert len(load(tmp_path / "mine", limit_test=4).test) == 4
    class_folders(tmp_path / "C/fog/2")
    assert load(tmp_path / "C", "fog", 2).name == "C-fog-2"
    needed = f"{tmp_path / 'C'}: has no corruption 'fog'; needed are CLASS/ folders"
    assert refusal(load, tmp_path / "C", "fog", 3).startswith(needed)


def test_image_files_of_another_size(tmp_path):
    class_folders(tmp_path / "mine", size=8)
    assert "0.png: the image is 8 x 8, those of the network are 6 x 6" in refusal(load, tmp_path / "mine")
    assert load(tmp_path / "mine", dataset="folder", image_size=6).test.raw.shape == (6, 3, 6, 6)  # as the training images were


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog", "cow"), "cow is no class of the network"),
        (("cat",), "dog is a class of the network that has no folder"),
        ((), "not a test set that can be read"),
    ],
)
def test_class_folders_of_other_classes(tmp_path, classes, message):
    (tmp_path / "mine").mkdir()
    class_folders(tmp_path / "mine", classes)
    assert message in refusal(load, tmp_path / "mine")


def test_class_folders_without_images_and_other_files(tmp_path):
    for name in SPEC.classes:
        (tmp_path / "mine" / name).mkdir(parents=True)
    assert "its class folders contain no image" in refusal(load, tmp_path / "mine")
    (tmp_path / "mine/cat/x.txt").write_text("no image")
    assert "x.txt: not an image that can be decoded" in refusal(load, tmp_path / "mine")
    assert "x.txt: not a test set that can be read" in refusal(load, tmp_path / "mine/cat/x.txt")
