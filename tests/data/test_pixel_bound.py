"""Images of more pixels than are decoded, wherever images are opened."""

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
from advmoe.runs import predict

HUGE = huge_png(8001, 8000)
SAID = "the image is 8001 x 8000"


@pytest.fixture(autouse=True)
def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))


def folder(place: Path) -> None:
    for name in ("a", "b"):
        for row in range(4):
            (place / name).mkdir(exist_ok=True)
            (place / name / f"{row}.png").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="folder", data_dir=str(place), image_size=8))


def cifar(place: Path) -> None:
    from advmoe.data.cifar import CIFAR10

    for part in ("train", "test"):
        for name in CIFAR10.spec.classes:
            (place / part / name).mkdir(parents=True)
            (place / part / name / "x.png").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="cifar10", data_dir=str(place)))


def tinyimagenet(place: Path) -> None:
    (place / "train/n1/images").mkdir(parents=True)
    (place / "train/n1/images/n1_0.JPEG").write_bytes(HUGE)
    (place / "val/images").mkdir(parents=True)
    (place / "val/images/val_0.JPEG").write_bytes(HUGE)
    (place / "val/val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t1\t1\n")
    (place / "wnids.txt").write_text("n1\n")
    (place / "words.txt").write_text("n1\tone\n")
    load_dataset(DataConfig(dataset="tinyimagenet", data_dir=str(place)))


def imagenet(place: Path) -> None:
    for part in ("train", "val"):
        for name in ("n1", "n2"):
            (place / part / name).mkdir(parents=True)
            for row in range(3):
                (place / part / name / f"{row}.JPEG").write_bytes(HUGE)
    load_dataset(DataConfig(dataset="imagenet", data_dir=str(place))).test.pixels()


def a_file(place: Path, dataset: str = "cifar10") -> None:
    """As `advmoe predict` and `advmoe attack` read it."""
    (place / "x.png").write_bytes(HUGE)
    model: Any = SimpleNamespace(input_size=(3, 32, 32), config=SimpleNamespace(data=SimpleNamespace(dataset=dataset)))
    predict.read(model, place / "x.png")


@pytest.mark.parametrize("use", [folder, cifar, tinyimagenet, imagenet, a_file, lambda place: a_file(place, "imagenet")])
def test_too_many_pixels_are_refused(use: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=SAID) as caught:
        use(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("shrink", [False, True])
def test_a_draft_does_not_make_an_image_smaller(shrink: bool) -> None:
    """Progressive JPEG are held whole, whatever part of their detail is asked for."""
    file = io.BytesIO()
    Image.new("L", (8001, 8000)).save(file, "JPEG", progressive=True)
    with pytest.raises(UserError, match=SAID):
        resized_crop(file.getvalue(), centre_crop, "here", shrink=shrink)
