import io
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
import torch
from PIL import Image

from advmoe.config import DataConfig
from advmoe.data import DATASETS, load_dataset
from advmoe.data.images import Splits
from advmoe.data.stream import Streamed
from advmoe.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02105855")
EACH = {"train": 4, "val": 2}  # images of each class


def photo(part: str, row: int) -> bytes:
    coarse = np.random.default_rng([len(part), row]).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def label_of(row: int) -> int:
    return row % len(WNIDS)


def write_folders(folder: Path) -> Path:
    for part, each in EACH.items():
        for row in range(each * len(WNIDS)):
            wnid = WNIDS[label_of(row)]
            path = folder / part / wnid / f"{wnid}_{row}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(part, row))
    return folder


def members(part: str, rows: range) -> dict[str, bytes]:
    files = {}
    for row in rows:
        files |= {f"s{row:04d}.jpg": photo(part, row), f"s{row:04d}.json": b"{}", f"s{row:04d}.cls": b"%d\n" % label_of(row)}
    return files


def write_shard(path: Path, content: dict[str, bytes], **fields: Any) -> Path:
    """A tar of `content`; `fields` are set on its third member."""
    with tarfile.open(path, "w") as archive:
        for number, (name, data) in enumerate(content.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if number == 2:
                for field, value in fields.items():
                    setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_shard(folder / "small-train-000000.tar", members("train", range(7)))
    write_shard(folder / "small-train-000001.tar", members("train", range(7, 12)))
    write_shard(folder / "small-validation-00.tar", members("val", range(6)))
    return folder


error_line = partial(damage.error_line, dataset="imagenet")
FORMS: dict[str, Callable[[Path], Path]] = {"folders": write_folders, "shards": write_shards}


def load(path: Path, **fields: Any) -> Splits:
    return load_dataset(DataConfig(**{"dataset": "imagenet", "data_dir": str(path), "validation_share": 0.25} | fields))


def contents(*parts: Any) -> list[tuple[bytes, int]]:
    """Encoded images with their labels, sorted."""
    images = []
    for part in parts:
        assert isinstance(part, Streamed)
        images += [(part.files.read(int(row)), int(label)) for row, label in zip(part.rows, part.labels, strict=True)]
    return sorted(images)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_all_images_with_their_labels(form: str, tmp_path: Path) -> None:
    splits = load(FORMS[form](tmp_path))
    assert contents(splits.train, splits.val) == sorted((photo("train", row), label_of(row)) for row in range(12))
    assert contents(splits.test) == sorted((photo("val", row), label_of(row)) for row in range(6))
    assert splits.name == "imagenet"
    assert splits.spec.shape == (3, 224, 224)
    assert splits.spec.mean == (0.485, 0.456, 0.406)
    assert splits.spec.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("form", "classes"), [("folders", WNIDS), ("shards", ("class-0000", "class-0001", "class-0002"))])
def test_classes_are_known_before_the_images(form: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    path = FORMS[form](tmp_path)
    splits = load(path)
    assert splits.spec.classes == classes
    assert DATASETS["imagenet"].spec(DataConfig(dataset="imagenet", data_dir=str(path))) == splits.spec


def test_without_a_path_there_are_a_thousand_classes() -> None:
    known = DATASETS["imagenet"].spec(DataConfig(dataset="imagenet"))
    assert (len(known.classes), known.classes[0], known.classes[-1]) == (1000, "class-0000", "class-0999")


@pytest.mark.parametrize("form", FORMS)
def test_held_out_split_is_stratified_and_fixed(form: str, tmp_path: Path) -> None:
    splits, reloaded = load(FORMS[form](tmp_path)), load(tmp_path)
    assert torch.bincount(splits.val.labels).tolist() == [1, 1, 1]
    assert torch.bincount(splits.train.labels).tolist() == [3, 3, 3]
    assert contents(splits.val) == contents(reloaded.val)


def test_limits(tmp_path: Path) -> None:
    unlimited, few = load(write_folders(tmp_path)), load(tmp_path, limit_train=6, limit_test=3)
    assert [len(part) for part in (few.train, few.val, few.test)] == [6, 3, 3]
    assert torch.bincount(few.train.labels).tolist() == [2, 2, 2]
    assert few.fingerprint == unlimited.fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_images_are_trained_on_and_evaluated(form: str, tmp_path: Path) -> None:
    splits = load(FORMS[form](tmp_path)).to(torch.device("cpu"))
    (batch,) = splits.train.augmented([np.array([8, 0, 4])], [5], DataConfig(workers=1))
    assert batch.raw.shape == (3, 3, 224, 224)
    assert torch.equal(batch.labels, splits.train.labels[[8, 0, 4]])
    assert splits.test.pixels().shape == (6, 3, 224, 224)


def test_both_forms_give_the_same_pixels(tmp_path: Path) -> None:
    for name in FORMS:
        (tmp_path / name).mkdir()
    folders, shards = (load(FORMS[name](tmp_path / name)).test for name in FORMS)
    images = [{image.numpy().tobytes() for image in part[torch.arange(6)].raw} for part in (folders, shards)]
    assert images[0] == images[1]
    assert len(images[0]) == 6


@pytest.mark.parametrize("form", FORMS)
def test_fingerprint_sees_what_changed(form: str, tmp_path: Path) -> None:
    first = load(FORMS[form](tmp_path)).fingerprint
    assert load(tmp_path).fingerprint == load(tmp_path, limit_test=3, validation_share=0.5).fingerprint == first
    if form == "folders":
        path = tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
        path.write_bytes(path.read_bytes() + b"x")
        longer = load(tmp_path).fingerprint
        path.write_bytes(path.read_bytes()[:-1])
        path.rename(path.with_name("other.JPEG"))
    else:
        content = members("val", range(6))
        write_shard(tmp_path / "small-validation-00.tar", content | {"s0005.cls": b"1", "s0004.cls": b"2"})
        longer = load(tmp_path).fingerprint
        write_shard(tmp_path / "small-validation-00.tar", content | {"s0003.jpg": content["s0003.jpg"][:-1] + b"x"})
    assert len({first, longer, load(tmp_path).fingerprint}) == 3


def test_files_that_are_no_images_are_skipped(tmp_path: Path) -> None:
    first = load(write_folders(tmp_path)).fingerprint
    for name in (".hidden.JPEG", "Thumbs.db", "list.txt"):
        (tmp_path / "train" / WNIDS[1] / name).write_bytes(b"x")
    (tmp_path / "train" / "notes.txt").write_bytes(b"x")
    assert load(tmp_path).fingerprint == first


# What is missing or wrong


def test_missing_data(tmp_path: Path) -> None:
    assert "imagenet needs --data-dir" in error_line(None)
    assert error_line(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"x")
    assert error_line(tmp_path).startswith(f"{tmp_path}: contains no train/ and no shard like NAME-train-000000.tar; needed are")
    assert error_line(tmp_path / "ILSVRC2012_img_train.tar").endswith("NAME-val-000000.tar")


def test_missing_splits(tmp_path: Path) -> None:
    shutil.rmtree(write_folders(tmp_path) / "val")
    assert error_line(tmp_path) == f"{tmp_path / 'val'}: no such folder"
    (tmp_path / "val").mkdir()
    assert error_line(tmp_path) == f"{tmp_path / 'val'}: contains no class folder"


def test_a_shard_with_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    """tarfile raises ValueError for this one."""
    path = write_shards(tmp_path) / "small-train-000001.tar"
    write_shard(path, members("train", range(7, 12)), pax_headers={"GNU.sparse.map": "x"})
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete tar archive (")


def test_missing_val_shards(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "small-validation-00.tar").unlink()
    assert error_line(tmp_path).startswith(f"{tmp_path}: contains no val/ and no shard like NAME-val-")


def test_training_shards_are_not_mistaken_for_validation_shards(tmp_path: Path) -> None:
    """Of a set whose name has "val" or "train" in it; each shard has other images."""
    expected = load(write_shards(tmp_path / "a")).fingerprint
    for path in sorted((tmp_path / "a").iterdir()):
        path.rename(path.with_name(path.name.replace("small", "naval-constrained-retrieval")))
    (tmp_path / "a" / "set-trainval-000000.tar").write_bytes(b"not read")
    splits = load(tmp_path / "a")
    assert [len(splits.train) + len(splits.val), len(splits.test)] == [12, 6]
    assert splits.fingerprint != expected  # which has the names of the shards


def test_shards_of_two_sets_or_two_splits_are_refused(tmp_path: Path) -> None:
    write_shard(write_shards(tmp_path) / "other-train-000000.tar", members("train", range(7)))
    assert "two sets of files for the train split, which would be counted together" in error_line(tmp_path)
    (tmp_path / "other-train-000000.tar").rename(tmp_path / "train-val-000000.tar")
    assert error_line(tmp_path) == f"{tmp_path}/train-val-000000.tar: its name fits the splits train and val; rename it"


def test_labels_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    first = load(write_shards(tmp_path))
    write_shard(tmp_path / "small-validation-00.tar", members("val", range(6)) | {"s0001.cls": b"\xef\xbb\xbf1"})
    assert torch.equal(load(tmp_path).test.labels, first.test.labels)


def test_a_class_folder_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (write_folders(tmp_path) / "train" / WNIDS[0]).rename(os.fsdecode(os.fsencode(tmp_path / "train") + b"/n\xff"))
    assert error_line(tmp_path).startswith(rf"{tmp_path}/train/n\udcff: the name of a class folder must be UTF-8 text")


def test_empty_class_folder(tmp_path: Path) -> None:
    for path in (write_folders(tmp_path) / "val" / WNIDS[1]).iterdir():
        path.unlink()
    assert error_line(tmp_path).startswith(f"{tmp_path / 'val' / WNIDS[1]}: contains no image (.jpeg")


@pytest.mark.parametrize(("part", "counts"), [("train", "2 classes in train, 3 in val"), ("val", "3 classes in train, 2 in val")])
def test_splits_with_different_class_folders(part: str, counts: str, tmp_path: Path) -> None:
    shutil.rmtree(write_folders(tmp_path) / part / WNIDS[1])
    assert error_line(tmp_path) == f"{tmp_path}: {counts}; {part} has no {WNIDS[1]}"


def test_splits_with_different_labels(tmp_path: Path) -> None:
    write_shard(write_shards(tmp_path) / "small-validation-00.tar", members("val", range(2)))
    assert error_line(tmp_path) == f"{tmp_path}: 3 classes in train, 2 in val; val has no class-0002"


def test_a_class_without_images_in_shards(tmp_path: Path) -> None:
    write_shard(write_shards(tmp_path) / "small-validation-00.tar", members("val", range(2)) | {"s0001.cls": b"999999999"})
    assert "no image of class 1, though labels go to 999999999" in error_line(tmp_path)


def test_shards_without_images(tmp_path: Path) -> None:
    path = write_shard(write_shards(tmp_path) / "small-validation-00.tar", {"a.json": b"{}"})
    assert error_line(tmp_path) == f"{path}: contains no image, nor does any shard after it"


def load_damaged(folder: Path, content: dict[str, bytes], **fields: Any) -> tuple[Path, str]:
    path = write_shard(write_shards(folder) / "small-train-000001.tar", content, **fields)
    return path, error_line(folder)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_a_link_or_device(kind: bytes, tmp_path: Path) -> None:
    path, text = load_damaged(tmp_path, members("train", range(7, 12)), type=kind, linkname="/etc/passwd", size=0)
    assert text == f"{path}: member 's0007.cls' is neither a file nor a folder"


@pytest.mark.parametrize(("name", "message"), [("s0008.cls", "s0008.jpg has no .cls"), ("s0008.jpg", "s0008.cls has no image")])
def test_a_member_without_its_pair(name: str, message: str, tmp_path: Path) -> None:
    content = members("train", range(7, 12))
    del content[name]
    path, text = load_damaged(tmp_path, content)
    assert text == f"{path}: {message} beside it"


@pytest.mark.parametrize("label", [b"cat", b"", b"-1", b"1.5", b"1_0", b"\xff", b"9" * 30, "٣".encode()])
def test_a_label_that_is_no_integer(label: bytes, tmp_path: Path) -> None:
    path, text = load_damaged(tmp_path, members("train", range(7, 12)) | {"s0009.cls": label})
    assert text.startswith(f"{path}: s0009.cls: label '")
    assert text.endswith(" is not a whole number from 0")


def test_a_key_that_occurs_twice(tmp_path: Path) -> None:
    path, text = load_damaged(tmp_path, members("train", range(7, 12)) | {"s0009.JPEG": b"x"})
    assert text == f"{path}: s0009 occurs twice"


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.5, 0.77])
def test_a_truncated_tar(share: float, tmp_path: Path) -> None:
    path = damage.cut(write_shards(tmp_path) / "small-train-000001.tar", share)
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete tar archive (")


def test_a_tar_truncated_between_two_members_or_overwritten(tmp_path: Path) -> None:
    path = write_shards(tmp_path) / "small-train-000001.tar"
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        starts = [member.offset for member in archive]
    for start in starts[1:]:
        for rest in (b"", b"\1" * 512, content[start : start + 100]):
            path.write_bytes(content[:start] + rest)
            assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete tar archive (")


def test_a_compressed_shard_cannot_be_read_in_place(tmp_path: Path) -> None:
    path = write_shards(tmp_path) / "small-train-000001.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    assert error_line(tmp_path).startswith(f"{path}: damaged or incomplete tar archive (")


def test_a_damaged_member_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    content = members("train", range(7, 12))
    path = write_shard(write_shards(tmp_path) / "small-train-000001.tar", content | {"s0009.jpg": content["s0009.jpg"][:300]})
    splits = load(tmp_path)
    with pytest.raises(UserError) as caught:
        _ = splits.train.pixels(), splits.val.pixels()
    assert str(caught.value).startswith(f"{path}: s0009.jpg: not an image that can be decoded (")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_changes_between_epochs_is_refused_and_reported(form: str, tmp_path: Path) -> None:
    """Content, size and fingerprint are the same; only the file's time differs."""
    splits = load(FORMS[form](tmp_path))
    first, second = (splits.train.augmented([np.arange(4)], [seed], DataConfig(workers=1)) for seed in (0, 1))
    assert len(list(first)) == 1
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=r"(tar|JPEG): changed since the run began \(modified at 1970-01-01T00:00:00\.0+ UTC,"):
        list(second)
    assert load(tmp_path).fingerprint == splits.fingerprint


def test_a_split_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert error_line(write_folders(tmp_path)) == f"{tmp_path / 'train'}: cannot be read (Permission denied)"


def test_a_class_of_one_image(tmp_path: Path) -> None:
    for path in sorted((write_folders(tmp_path) / "train" / WNIDS[2]).iterdir())[1:]:
        path.unlink()
    assert error_line(tmp_path).startswith("class 2 has 1 training image")
