import io
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import refusal

from advmoe.config import DataConfig
from advmoe.data import DATASETS, Splits, count_images, load_dataset
from advmoe.data.folder import channel_statistics
from advmoe.data.images import Source
from advmoe.errors import UserError

CLASSES = ("ant", "bee", "cat")


def array(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_classes(folder: Path, each: int, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    """`each` images of every class; no two with the same pixels."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for row in range(each):
            (folder / name / f"{row:02d}.png").write_bytes(encoded(array(1000 * seed + 100 * label + row, size)))
    return folder


def in_parts(folder: Path, val: bool = False) -> Path:
    for name, each, seed in [("train", 6, 1), ("test", 3, 2), *([("val", 2, 3)] if val else [])]:
        write_classes(folder / name, each, seed)
    return folder


def plain(folder: Path) -> Path:
    return write_classes(folder, 10, 4)


def load(path: Path, **fields: Any) -> Splits:
    return load_dataset(config(path, **fields))


def config(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(dataset="folder", data_dir=str(path), **{"validation_share": 0.34} | fields)


def contents(*parts: Source) -> dict[bytes, int]:
    """Label by pixels."""
    rows = [part[torch.arange(len(part))] for part in parts]
    return {image.numpy().tobytes(): label for row in rows for image, label in zip(row.raw, row.labels.tolist(), strict=True)}


def files_in(folder: Path) -> dict[bytes, int]:
    """Label by pixels, read from a folder of class folders."""
    return {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(): label
        for label, name in enumerate(CLASSES)
        for path in (folder / name).iterdir()
    }


def counts(*parts: Source) -> list[list[int]]:
    return [torch.bincount(part.labels, minlength=3).tolist() for part in parts]


# What is read


def test_splits_keep_their_images_and_labels(tmp_path: Path) -> None:
    splits = load(in_parts(tmp_path))
    assert contents(splits.train, splits.val) == files_in(tmp_path / "train")
    assert contents(splits.test) == files_in(tmp_path / "test")
    assert counts(splits.train, splits.val, splits.test) == [[4] * 3, [2] * 3, [3] * 3]
    assert (splits.name, splits.spec.classes, splits.spec.shape) == ("folder", CLASSES, (3, 16, 16))


def test_a_val_folder_is_used_and_nothing_is_held_out(tmp_path: Path) -> None:
    splits = load(in_parts(tmp_path, val=True))
    for name in ("train", "val", "test"):
        assert contents(getattr(splits, name)) == files_in(tmp_path / name)


@pytest.mark.parametrize("limits", [{}, {"limit_train": 7, "limit_test": 4}])
@pytest.mark.parametrize("write", [plain, in_parts, lambda folder: in_parts(folder, val=True)])
def test_images_are_counted_without_being_read(write: Callable[[Path], Path], limits: dict[str, int], tmp_path: Path) -> None:
    folder = write(tmp_path)
    splits = load(folder, **limits)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    assert count_images(config(folder, **limits)) == (len(splits.train), len(splits.val), len(splits.test))


def test_plain_classes_are_divided(tmp_path: Path) -> None:
    splits = load(plain(tmp_path))
    assert counts(splits.train, splits.val, splits.test) == [[5] * 3, [3] * 3, [2] * 3]
    assert contents(splits.train, splits.val, splits.test) == files_in(tmp_path)
    assert len(contents(splits.train)) + len(contents(splits.val)) + len(contents(splits.test)) == 30


@pytest.mark.parametrize("write", [plain, in_parts])
def test_splits_are_the_same_whatever_the_seed_and_the_files_names(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path)
    torch.manual_seed(1)
    first = load(folder)
    for number, path in enumerate(sorted(folder.glob("**/*.png"))):
        path.rename(path.with_name(f"{(number * 7) % 100:03d}-renamed.png"))
    torch.manual_seed(2)
    second = load(folder)
    assert first.fingerprint == second.fingerprint
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).raw, getattr(second, name).raw)


def test_classes_are_mixed_in_the_test_split(tmp_path: Path) -> None:
    labels = load(in_parts(tmp_path)).test.labels
    assert not torch.equal(labels, labels.sort().values)


@pytest.mark.parametrize("val", [False, True])
def test_limits_do_not_change_spec_and_fingerprint(val: bool, tmp_path: Path) -> None:
    unlimited = load(in_parts(tmp_path, val))
    splits = load(tmp_path, limit_train=6, limit_test=3)
    assert counts(splits.train, splits.test) == [[2] * 3, [1] * 3]
    assert counts(splits.val) == [[2 if val else 1] * 3]
    assert (splits.spec, splits.fingerprint) == (unlimited.spec, unlimited.fingerprint)


@pytest.mark.parametrize("write", [plain, in_parts, lambda folder: in_parts(folder, val=True)])
def test_spec_is_that_of_the_loaded_data(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path)
    assert DATASETS["folder"].spec(config(tmp_path)) == load(tmp_path, validation_share=0.5, limit_train=3).spec


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path: Path) -> None:
    spec = load(in_parts(tmp_path)).spec
    images = np.stack([np.asarray(Image.open(path)) for path in (tmp_path / "train").glob("*/*")]) / 255
    np.testing.assert_allclose(spec.mean, images.mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(spec.std, images.std((0, 1, 2)), atol=5.1e-5)
    assert [round(value, 4) for value in (*spec.mean, *spec.std)] == [*spec.mean, *spec.std]


def test_statistics_of_known_images() -> None:
    images = torch.tensor([[[[0, 255]], [[51, 51]], [[255, 255]]], [[[0, 255]], [[51, 51]], [[255, 252]]]], dtype=torch.uint8)
    mean, std = channel_statistics(images)
    assert mean == (0.5, 0.2, 0.9971)
    assert std == (0.5, 0.01, 0.01)


def test_class_names_are_sorted_and_may_have_any_letters(tmp_path: Path) -> None:
    write_classes(tmp_path, 4, 1)
    (tmp_path / "bee").rename(tmp_path / "Zürich 1")
    assert load(tmp_path).spec.classes == ("Zürich 1", "ant", "cat")


def test_a_class_may_be_written_in_other_unicode_forms_in_each_split(tmp_path: Path) -> None:
    for name, form in (("train", "NFC"), ("test", "NFD")):
        (in_parts(tmp_path / "x") / name / "bee").rename(tmp_path / "x" / name / unicodedata.normalize(form, "é"))
        shutil.move(tmp_path / "x" / name, tmp_path / name)
        shutil.rmtree(tmp_path / "x")
    splits = load(tmp_path)
    assert splits.spec.classes == ("ant", "cat", "é")
    assert counts(splits.test) == [[3] * 3]


def test_a_class_that_is_not_utf_8_is_refused_before_training(tmp_path: Path) -> None:
    (in_parts(tmp_path) / "train" / "bee").rename(os.fsdecode(os.fsencode(tmp_path / "train") + b"/b\xffe"))
    assert refusal(load, tmp_path).startswith(rf"{tmp_path}/train/b\udcffe: the name of a class folder must be UTF-8 text")


def test_hidden_files_and_other_files_beside_the_classes_are_skipped(tmp_path: Path) -> None:
    expected = load(in_parts(tmp_path)).fingerprint
    for name in (".DS_Store", "README.md", "train/labels.csv", "train/ant/.x.png"):
        (tmp_path / name).write_bytes(b"x")
    for name in (".git", "test/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    assert load(tmp_path).fingerprint == expected


def test_links_are_followed(tmp_path: Path) -> None:
    expected = load(in_parts(tmp_path / "real")).fingerprint
    for path in (tmp_path / "real" / "train").glob("*/*"):
        link = tmp_path / "linked" / path.relative_to(tmp_path / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (tmp_path / "linked" / "test").symlink_to(tmp_path / "real" / "test")
    assert load(tmp_path / "linked").fingerprint == expected


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    (plain(tmp_path) / "cat").rename(tmp_path / "train")
    assert load(tmp_path).spec.classes == ("ant", "bee", "train")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colours_become_rgb(mode: str, tmp_path: Path) -> None:
    data = encoded(array(0), "TIFF" if mode == "CMYK" else "PNG", mode)
    (in_parts(tmp_path) / "test" / "bee" / "00.png").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()
    assert contents(load(tmp_path).test)[pixels] == 1


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (in_parts(tmp_path) / "test" / "cat" / "00.png").write_bytes(encoded(array(5), exif=exif))
    assert contents(load(tmp_path).test)[np.rot90(array(5), -1).transpose(2, 0, 1).tobytes()] == 2


@pytest.mark.parametrize("size", [8, 16, 24])
def test_images_of_any_size_are_resized_to_image_size(size: int, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(in_parts(tmp_path).glob("*/*/*"))):
        path.write_bytes(encoded(array(number, (10 + number, 30 - number))))
    splits = load(tmp_path, image_size=size)
    assert splits.spec.shape == (3, size, size)
    assert splits.test[torch.arange(9)].raw.shape == (9, 3, size, size)
    assert len(contents(splits.train, splits.val, splits.test)) == 27


def test_the_size_that_the_images_have_changes_nothing(tmp_path: Path) -> None:
    assert load(in_parts(tmp_path)).fingerprint == load(tmp_path, image_size=16).fingerprint


# What is missing or mixed up


def test_no_data_dir() -> None:
    with pytest.raises(UserError, match=r"^folder needs --data-dir: a path that contains train/CLASS/, test/CLASS/ and"):
        load_dataset(DataConfig(dataset="folder"))


def test_nonexistent_path_and_a_file(tmp_path: Path) -> None:
    assert refusal(load, tmp_path / "no") == f"{tmp_path / 'no'}: no such file or folder"
    (tmp_path / "a.zip").write_bytes(b"x")
    assert refusal(load, tmp_path / "a.zip").startswith(f"{tmp_path / 'a.zip'}: not a folder; ")


def test_empty_folder(tmp_path: Path) -> None:
    assert refusal(load, tmp_path).startswith(f"{tmp_path}: needs the folders of 2 classes or more, has none; give train/CLASS/")


def test_one_class(tmp_path: Path) -> None:
    plain(tmp_path)
    for name in ("bee", "cat"):
        shutil.rmtree(tmp_path / name)
    assert refusal(load, tmp_path).startswith(f"{tmp_path}: needs the folders of 2 classes or more, has ant; give ")


def test_the_parent_of_the_data_folder(tmp_path: Path) -> None:
    in_parts(tmp_path / "mine")
    path = tmp_path / "mine" / "test"
    assert refusal(load, tmp_path) == f"{path}: not a plain file; the folder of a class may contain images only"


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_split(part: str, tmp_path: Path) -> None:
    shutil.rmtree(in_parts(tmp_path) / part)
    assert refusal(load, tmp_path).startswith(f"{tmp_path / part}: no such folder; ")


def test_a_val_folder_beside_classes(tmp_path: Path) -> None:
    (in_parts(tmp_path / "parts", val=True) / "val").rename(plain(tmp_path / "classes") / "val")
    path = tmp_path / "classes"
    assert refusal(load, path) == f"{path / 'val'}: has folders of classes, so {path} needs train and test beside it"


def test_misspelled_split_is_not_skipped(tmp_path: Path) -> None:
    (in_parts(tmp_path, val=True) / "val").rename(tmp_path / "valid")
    assert refusal(load, tmp_path) == f"{tmp_path / 'valid'}: not a split; beside train and test there may be a folder val"


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("kind", ["lacks", "has more"])
def test_splits_with_other_classes(part: str, kind: str, tmp_path: Path) -> None:
    in_parts(tmp_path, val=True)
    if kind == "lacks":
        shutil.rmtree(tmp_path / part / "bee")
        message = (
            "val/bee: class bee is in val, but not in train"
            if part == "train"
            else f"train/bee: class bee is in train, but not in {part}"
        )
    else:
        shutil.copytree(tmp_path / part / "bee", tmp_path / part / "dog")
        message = (
            "train/dog: class dog is in train, but not in val"
            if part == "train"
            else f"{part}/dog: class dog is in {part}, but not in train"
        )
    assert refusal(load, tmp_path) == f"{tmp_path}/{message}"


def test_empty_class_folder(tmp_path: Path) -> None:
    for path in (in_parts(tmp_path) / "test" / "bee").iterdir():
        path.unlink()
    (tmp_path / "test" / "bee" / ".hidden.png").write_bytes(encoded(array(0)))
    assert refusal(load, tmp_path) == f"{tmp_path / 'test' / 'bee'}: contains no image"


@pytest.mark.parametrize(("write", "least"), [(plain, 3), (in_parts, 2), (lambda folder: in_parts(folder, val=True), 1)])
def test_class_with_too_few_images(write: Callable[[Path], Path], least: int, tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / "train" / "bee" if (tmp_path / "train").exists() else tmp_path / "bee"
    for path in sorted(folder.iterdir())[least:]:
        path.unlink()
    splits = load(tmp_path)
    assert (splits.train.labels == 1).sum() == 1
    assert (splits.test.labels == 1).any()
    assert (splits.val.labels == 1).any()
    next(folder.iterdir()).unlink()
    message = f"class bee has {least - 1} training image(s), at least {least} are needed" if least > 1 else "contains no image"
    assert refusal(load, tmp_path) == f"{folder}: {message}"


@pytest.mark.parametrize("name", ["stray.PNG", "train/stray.jpeg"])
def test_images_outside_of_the_classes_are_an_error(name: str, tmp_path: Path) -> None:
    write = in_parts if "/" in name else plain
    path = write(tmp_path) / name
    path.write_bytes(encoded(array(0)))
    assert refusal(load, tmp_path) == f"{path}: is outside the class folders"


def test_unlabelled_splits_are_not_mistaken_for_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(array(0)))
    assert refusal(load, tmp_path) == f"{tmp_path / 'train' / '0.png'}: is outside the class folders"


@pytest.mark.parametrize("kind", ["folder", "broken link", "pipe"])
def test_what_is_no_plain_file_is_an_error(kind: str, tmp_path: Path) -> None:
    path = in_parts(tmp_path) / "train" / "cat" / "more.png"
    {"folder": path.mkdir, "broken link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path)}[kind]()
    assert refusal(load, tmp_path) == f"{path}: not a plain file; the folder of a class may contain images only"


BAD_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "cut png": encoded(array(0))[:300],
    "cut jpeg": encoded(array(0), "JPEG")[:500],
    "postscript": encoded(array(0), "EPS"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("size", [None, 8])
def test_bad_image_is_named(name: str, part: str, size: int | None, tmp_path: Path) -> None:
    path = in_parts(tmp_path) / part / "bee" / "01.png"
    path.write_bytes(BAD_IMAGES[name])
    assert refusal(load, tmp_path, image_size=size).startswith(f"{path}: not an image that can be decoded (")


def test_other_files_in_a_class_are_an_error(tmp_path: Path) -> None:
    path = in_parts(tmp_path) / "train" / "bee" / "notes.txt"
    path.write_text("a bee")
    assert refusal(load, tmp_path).startswith(f"{path}: not an image that can be decoded (")


def test_images_that_are_not_square_need_a_size(tmp_path: Path) -> None:
    path = in_parts(tmp_path) / "train" / "ant" / "00.png"
    path.write_bytes(encoded(array(0, (20, 16))))
    assert refusal(load, tmp_path) == f"{path}: the image is 20 x 16, not square: give --image-size"


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_of_several_sizes_need_a_size(part: str, tmp_path: Path) -> None:
    path = in_parts(tmp_path) / part / "cat" / "02.png"
    path.write_bytes(encoded(array(0, (17, 17))))
    assert refusal(load, tmp_path) == f"{path}: the image is 17 x 17, the first one 16 x 16: give --image-size"


def test_more_images_than_fit_into_memory(tmp_path: Path) -> None:
    assert refusal(load, in_parts(tmp_path), image_size=10**7).startswith("18 images of 10000000 x 10000000 need ")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    in_parts(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(load, tmp_path, image_size=8) == f"{tmp_path / 'train' / 'ant' / '00.png'}: cannot be read (Permission denied)"
