"""Images of too many pixels are refused wherever images are opened."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import huge_png
from PIL import Image

from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.data.stream import centre_crop, resized_crop
from advmoe.errors import UserError
from advmoe.runs.loaded import Loaded

HUGE = huge_png(8001, 8000)
MESSAGE = "the image is 8001 x 8000"


@pytest.fixture(autouse=True)
def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))


def class_folders(folder: Path) -> None:
    for name in ("a", "b"):
        for row in range(4):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{row}.png").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="folder", data_dir=str(folder), image_size=8))


def cifar(folder: Path) -> None:
    from advmoe.data.cifar import CIFAR10

    for part in ("train", "test"):
        for name in CIFAR10.spec.classes:
            (folder / part / name).mkdir(parents=True)
            (folder / part / name / "x.png").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="cifar10", data_dir=str(folder)))


def tinyimagenet(folder: Path) -> None:
    (folder / "train/n1/images").mkdir(parents=True)
    (folder / "train/n1/images/n1_0.JPEG").write_bytes(HUGE)
    (folder / "val/images").mkdir(parents=True)
    (folder / "val/images/val_0.JPEG").write_bytes(HUGE)
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t1\t1\n")
    (folder / "wnids.txt").write_text("n1\n")
    (folder / "words.txt").write_text("n1\tone\n")
    load_dataset(DataConfig(dataset="tinyimagenet", data_dir=str(folder)))


def imagenet(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("n1", "n2"):
            (folder / part / name).mkdir(parents=True)
            for row in range(3):
                (folder / part / name / f"{row}.JPEG").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="imagenet", data_dir=str(folder))).test.pixels()


def single_file(folder: Path, dataset: str = "cifar10") -> None:
    """As `advmoe predict` and `advmoe attack` read it."""
    (folder / "x.png").write_bytes(HUGE)
    model: Any = SimpleNamespace(input_size=(3, 32, 32), config=SimpleNamespace(data=SimpleNamespace(dataset=dataset)))
    Loaded.read(model, folder / "x.png")


@pytest.mark.parametrize(
    "load", [class_folders, cifar, tinyimagenet, imagenet, single_file, lambda folder: single_file(folder, "imagenet")]
)
def test_too_many_pixels_are_refused(load: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=MESSAGE) as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("shrink", [False, True])
def test_the_bound_holds_for_images_that_are_shrunk_while_decoded(shrink: bool) -> None:
    """Pillow decodes a progressive JPEG completely, even at a reduced size."""
    file = io.BytesIO()
    Image.new("L", (8001, 8000)).save(file, "JPEG", progressive=True)
    with pytest.raises(UserError, match=MESSAGE):
        resized_crop(file.getvalue(), centre_crop, "here", shrink=shrink)
