import io
import zipfile
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
from advmoe.errors import UserError

WNIDS = ("n02124075", "n01443537", "n04067472")  # not sorted, as in the official file
SORTED = tuple(sorted(WNIDS))


def jpeg(seed: int, mode: str = "RGB", size: int = 64) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()


def files() -> dict[str, bytes]:
    """The official layout with 3 classes, 6 training and 2 val images of each, by path."""
    content = {"wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(), "words.txt": b"n01443537\tgoldfish\n"}
    lines = []
    for number, wnid in enumerate(WNIDS):
        content[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        for row in range(6):
            content[f"train/{wnid}/images/{wnid}_{row}.JPEG"] = jpeg(10 * number + row, "L" if row == 3 else "RGB")
        for row in range(2):
            name = f"val_{3 * row + number}.JPEG"
            content[f"val/images/{name}"] = jpeg(100 + 10 * number + row)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    content["val/val_annotations.txt"] = "".join(lines).encode()
    content["test/images/test_0.JPEG"] = jpeg(999)
    return content


def write(folder: Path, content: dict[str, bytes] | None = None) -> Path:
    for name, data in (content or files()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path: Path, content: dict[str, bytes] | None = None, root: str = "tiny-imagenet-200/") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("tiny-imagenet-200")
        for name, data in (content or files()).items():
            archive.writestr(root + name, data)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": write,
    "folder above": lambda folder: write(folder / "tiny-imagenet-200").parent,
    "zip": lambda folder: write_zip(folder / "mine.zip"),
    "zip without a root": lambda folder: write_zip(folder / "mine.zip", root=""),
    "folder of the zip": lambda folder: write_zip(folder / "tiny-imagenet-200.zip").parent,
}


def config(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(dataset="tinyimagenet", data_dir=str(path), **{"validation_share": 0.3} | fields)


def error_line(path: Path, function: Callable[[DataConfig], Any] = load_dataset) -> str:
    return refusal(function, config(path))


def error_of_changed(folder: Path, **changes: bytes | None) -> str:
    """The error of loading data in which some files are replaced (None: removed), the same for folder and zip."""
    content = {name: data for name, data in (files() | changes).items() if data is not None}
    data, path = write(folder / "a", content), write_zip(folder / "b.zip", content)
    message = error_line(data).replace(str(data), "DATA")
    assert error_line(path).replace(str(path), "DATA") == message
    return message


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_dataset(config(write(tmp_path_factory.mktemp("expected"))))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_data(form: str, tmp_path: Path, expected: Splits) -> None:
    data = config(FORMS[form](tmp_path))
    splits = load_dataset(data)
    assert (splits.name, splits.fingerprint, splits.spec) == ("tinyimagenet", expected.fingerprint, expected.spec)
    assert torch.equal(splits.test.labels, expected.test.labels)
    assert count_images(data) == (len(splits.train), len(splits.val), len(splits.test))


def test_classes_are_the_sorted_wordnet_ids(expected: Splits) -> None:
    assert (expected.spec.classes, expected.spec.shape) == (SORTED, (3, 64, 64))


def test_official_val_split_is_the_test_split(expected: Splits) -> None:
    content = files()
    labels = dict(line.split("\t")[:2] for line in content["val/val_annotations.txt"].decode().splitlines())
    expected_images = {pixels(content[f"val/images/{name}"]): SORTED.index(wnid) for name, wnid in labels.items()}
    images = zip(expected.test[torch.arange(6)].raw, expected.test.labels.tolist(), strict=True)
    assert {image.numpy().tobytes(): label for image, label in images} == expected_images


def test_train_and_val_are_the_official_training_split(expected: Splits) -> None:
    expected_images = {
        pixels(data): SORTED.index(name.split("/")[1])
        for name, data in files().items()
        if name.startswith("train/") and "JPEG" in name
    }
    images = {}
    for part in (expected.train, expected.val):
        rows = part[torch.arange(len(part))]
        images |= {image.numpy().tobytes(): label for image, label in zip(rows.raw, rows.labels.tolist(), strict=True)}
    assert images == expected_images
    assert torch.bincount(expected.val.labels).tolist() == [2, 2, 2]


def test_limits(tmp_path: Path, expected: Splits) -> None:
    splits = load_dataset(config(write(tmp_path), limit_train=6, limit_test=3))
    assert [torch.bincount(part.labels).tolist() for part in (splits.train, splits.val, splits.test)] == [[2] * 3, [1] * 3, [1] * 3]
    assert splits.fingerprint == expected.fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_spec_is_known_before_the_images_are_read(form: str, tmp_path: Path, expected: Splits) -> None:
    folder = FORMS[form](tmp_path)
    for path in folder.glob("**/*.JPEG"):
        path.write_bytes(b"")
    assert DATASETS["tinyimagenet"].spec(config(folder)) == expected.spec


def test_spec_without_data_has_200_classes() -> None:
    spec = DATASETS["tinyimagenet"].spec(DataConfig(dataset="tinyimagenet"))
    assert (len(set(spec.classes)), spec.classes[0], spec.classes[199], spec.shape) == (200, "class-000", "class-199", (3, 64, 64))


def test_words_are_optional_and_hidden_files_are_skipped(tmp_path: Path, expected: Splits) -> None:
    content = files() | {
        "train/n01443537/images/.DS_Store": b"mac",
        "val/images/.x": b"",
        "wnids.txt": files()["wnids.txt"] + b"\n",
    }
    del content["words.txt"]
    assert load_dataset(config(write(tmp_path / "a", content))).fingerprint == expected.fingerprint
    assert load_dataset(config(write_zip(tmp_path / "b.zip", content))).fingerprint == expected.fingerprint


def test_byte_order_marks_are_skipped(tmp_path: Path, expected: Splits) -> None:
    marked = {name: b"\xef\xbb\xbf" + files()[name] for name in ("wnids.txt", "val/val_annotations.txt")}
    splits = load_dataset(config(write(tmp_path, files() | marked)))
    assert (splits.fingerprint, splits.spec) == (expected.fingerprint, expected.spec)


def test_nothing_of_a_zip_is_written(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in" / "tiny-imagenet-200.zip", files() | {"../../escaped.txt": b"x"})
    load_dataset(config(path))
    assert sorted(tmp_path.glob("**/*")) == [path.parent, path]


# What is missing or mixed up


def test_no_data_dir() -> None:
    with pytest.raises(UserError, match=r"^tinyimagenet needs --data-dir: a path that contains tiny-imagenet-200 "):
        load_dataset(DataConfig(dataset="tinyimagenet"))


@pytest.mark.parametrize("function", [load_dataset, DATASETS["tinyimagenet"].spec])
def test_nonexistent_path(function: Callable[[DataConfig], Any], tmp_path: Path) -> None:
    assert error_line(tmp_path / "no", function) == f"{tmp_path / 'no'}: no such file or folder"


def test_empty_folder(tmp_path: Path) -> None:
    assert (
        error_line(tmp_path)
        == f"{tmp_path}: contains no wnids.txt; give a path that contains tiny-imagenet-200 (folder) or tiny-imagenet-200.zip"
    )


def annotated(change: Callable[[list[str]], list[str]]) -> bytes:
    return "\n".join(change(files()["val/val_annotations.txt"].decode().splitlines())).encode()


ERRORS = {
    "no wnids": ({"wnids.txt": None}, "DATA: contains no wnids.txt; give "),
    "empty wnids": ({"wnids.txt": b"\n"}, "DATA/wnids.txt: is empty"),
    "long wnid": ({"wnids.txt": b"n" * 2000}, "DATA/wnids.txt: 'nnnn"),
    "wnid twice": ({"wnids.txt": files()["wnids.txt"] + b"n01443537\n"}, "DATA/wnids.txt: n01443537 is listed twice"),
    "wnids no text": ({"wnids.txt": b"\xff\xfe\x80"}, "DATA/wnids.txt: not a text file in UTF-8"),
    "wnid without images": ({"wnids.txt": files()["wnids.txt"] + b"n9\n"}, "DATA/train/n9/images: contains no image"),
    "class not in wnids": ({"train/n7/images/n7_0.JPEG": jpeg(0)}, "DATA/train/n7: n7 is not in wnids.txt"),
    "no annotations": ({"val/val_annotations.txt": None}, "DATA: contains no val/val_annotations.txt; give "),
    "unknown wnid": (
        {"val/val_annotations.txt": annotated(lambda lines: [*lines[:2], lines[2].replace(WNIDS[1], "n5"), *lines[3:]])},
        "DATA/val/val_annotations.txt: line 3: 'n5' is not in wnids.txt",
    ),
    "listed but missing": (
        {"val/images/val_4.JPEG": None}, "DATA/val/images/val_4.JPEG: no such file, but it is listed in val/val_annotations.txt",
    ),
    "image without a line": (
        {"val/images/val_77.JPEG": jpeg(0)}, "DATA/val/images/val_77.JPEG: has no line in val/val_annotations.txt",
    ),
    "listed twice": (
        {"val/val_annotations.txt": annotated(lambda lines: [*lines, lines[1]])},
        "DATA/val/val_annotations.txt: line 7: val_3.JPEG is listed twice",
    ),
    "no tabs": (
        {"val/val_annotations.txt": annotated(lambda lines: [lines[0].replace("\t", " "), *lines[1:]])},
        f"DATA/val/val_annotations.txt: line 1: 'val_0.JPEG {WNIDS[0]} 0 32 44 62' is not a file, a WordNet id and a box, ",
    ),
    "text for an image": (
        {"train/n04067472/images/n04067472_2.JPEG": b"hello"}, "DATA/train/n04067472/images/n04067472_2.JPEG: not an image",
    ),
    "cut image": ({"val/images/val_3.JPEG": jpeg(0)[:700]}, "DATA/val/images/val_3.JPEG: not an image that can be decoded ("),
    "other size": ({"val/images/val_3.JPEG": jpeg(0, size=63)}, "DATA/val/images/val_3.JPEG: the image is 63 x 63, not 64 x 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_named(name: str, tmp_path: Path) -> None:
    changes, message = ERRORS[name]
    assert error_of_changed(tmp_path, **changes).startswith(message)


def test_a_class_of_one_training_image(tmp_path: Path) -> None:
    gone = {f"train/{SORTED[1]}/images/{SORTED[1]}_{row}.JPEG": None for row in range(1, 6)}
    assert "class 1 has 1 training image" in error_of_changed(tmp_path, **gone)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_zip(share: float, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "mine.zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert error_line(path).startswith(f"{path}: damaged or incomplete zip archive (")


def test_zip_with_a_flipped_bit(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "mine.zip")
    data, image = path.read_bytes(), files()["val/images/val_5.JPEG"]
    position = data.index(image) + len(image) // 2
    path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    assert error_line(path).startswith(f"{path}/val/images/val_5.JPEG: damaged in the archive (Bad CRC-32")


def test_a_list_that_takes_more_memory_than_its_zip_justifies(tmp_path: Path) -> None:
    path = tmp_path / "mine.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wnids.txt", b" " * 2**21)
    assert error_line(path).startswith(f"{path}/wnids.txt: has 2,097,152 bytes, packed in 2,")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    folder = write(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_line(folder) == f"{folder / 'wnids.txt'}: cannot be read (Permission denied)"
