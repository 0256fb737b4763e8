"""Generated images, mapped from their file and mixed into training batches."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusal import refusal

from advmoe import distributed
from advmoe.config import DataConfig
from advmoe.data import Images, ImageSpec, Splits, with_generated
from advmoe.data.arrays import map_npz
from advmoe.data.generated import MixedImages
from advmoe.data.stream import Entry, stream
from advmoe.errors import UserError

SPEC = ImageSpec(("a", "b", "c"), (2, 4, 6), (0.5, 0.5), (0.2, 0.2))
IMAGES = np.random.default_rng(0).integers(100, 200, (50, 4, 6, 2), dtype=np.uint8)
LABELS = np.arange(50) % 3


@pytest.fixture
def splits() -> Splits:
    train = Images(torch.full((30, 2, 4, 6), 9, dtype=torch.uint8), torch.arange(30) % 3)
    return Splits("toy", SPEC, "0" * 64, train, train, train)


def config(path: Path, share: float = 0.3) -> DataConfig:
    return DataConfig(generated=str(path), generated_share=share, crop_padding=0, flip=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", image=IMAGES, label=LABELS)
    return tmp_path / "images.npz"


def test_arrays_are_mapped_at_their_offset(path: Path) -> None:
    mapped = map_npz(path, "image")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, IMAGES)
    assert not mapped.flags.writeable
    np.savez(path, image=np.asfortranarray(IMAGES))
    assert np.array_equal(map_npz(path, "image"), IMAGES)


@pytest.mark.parametrize(("share", "count"), [(0.3, 3), (0.01, 1), (0.99, 9)])
def test_every_batch_has_the_share(share: float, count: int, splits: Splits, path: Path) -> None:
    data = config(path, share)
    mixed = with_generated(splits, data)
    rows = [np.arange(10), np.arange(10, 20)]
    batches = list(mixed.train.augmented(rows, [5, 6], data))
    for batch, indices in zip(batches, rows, strict=True):
        assert (batch.raw == 9).flatten(1).all(dim=1).tolist() == [True] * (10 - count) + [False] * count
        assert batch.labels[:-count].tolist() == (indices[: 10 - count] % 3).tolist()
        for image, label in zip(batch.raw[-count:], batch.labels[-count:], strict=True):
            match = (image.permute(1, 2, 0).numpy() == IMAGES).all(axis=(1, 2, 3))
            assert LABELS[match].tolist() == [label]
    repeated = next(mixed.train.augmented(rows[:1], [5], data))
    assert torch.equal(repeated.raw, batches[0].raw)
    assert not torch.equal(batches[0].raw, batches[1].raw)


def test_ranks_share_a_mixed_batch(splits: Splits, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(path, 0.7)
    mixed = with_generated(splits, data).train
    (batch,) = mixed.augmented([np.arange(9)], [5], data)
    parts = []
    for local in (slice(0, 5), slice(5, 9)):
        monkeypatch.setattr(distributed, "local_rows", lambda images, local=local: local)
        parts += mixed.augmented([np.arange(9)], [5], data)
    assert torch.equal(torch.cat([part.raw for part in parts]), batch.raw)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_other_splits_and_single_rows_do_not_change(splits: Splits, path: Path) -> None:
    mixed = with_generated(splits, config(path))
    assert isinstance(mixed.train, MixedImages)
    assert (mixed.val, mixed.test, mixed.fingerprint) == (splits.val, splits.test, splits.fingerprint)
    assert len(mixed.train) == 30
    assert (mixed.train[torch.tensor([3])].raw == 9).all()
    assert with_generated(splits, DataConfig()) is splits


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **{"image": IMAGES, "label": LABELS} | arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": IMAGES.astype(float)}, "image must be uint8 of shape (n, 4, 6, 2), not float64 of shape (50, 4, 6, 2)"),
        ({"image": IMAGES.transpose(0, 3, 1, 2)}, "image must be uint8 of shape (n, 4, 6, 2), not uint8 of shape (50, 2, 4, 6)"),
        ({"image": IMAGES[:0], "label": LABELS[:0]}, "image must be uint8 of shape (n, 4, 6, 2), not uint8 of shape (0, 4, 6, 2)"),
        ({"label": LABELS / 2}, "label must be integers of shape (50,), not float64 of shape (50,)"),
        ({"label": LABELS[1:]}, "label must be integers of shape (50,), not int64 of shape (49,)"),
        ({"label": LABELS + 1}, "label 3 in row 2 is not a whole number from 0 to 2"),
        ({"label": LABELS - 1}, "label -1 in row 0 is not a whole number from 0 to 2"),
    ],
)
def test_other_arrays_are_refused_in_one_line(arrays: dict, message: str, splits: Splits, path: Path) -> None:
    assert refusal(with_generated, splits, config(write_arrays(path, **arrays))) == f"{path}: {message}"


def test_files_that_cannot_be_mapped_are_refused_in_one_line(splits: Splits, path: Path) -> None:
    np.savez(path, pictures=IMAGES)
    with pytest.raises(UserError, match=r"images\.npz: contains no array 'image', only pictures$"):
        with_generated(splits, config(path))
    np.savez_compressed(path, image=IMAGES, label=LABELS)
    with pytest.raises(UserError, match=r"\.npz: image: is compressed and cannot be mapped; write the file with numpy\.savez$"):
        with_generated(splits, config(path))
    content = write_arrays(path).read_bytes().replace(b"(50, 4, 6, 2)", b"(60, 4, 6, 2)", 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npz: image: not an array that can be mapped \(2400 bytes, 2880 declared\)$"):
        with_generated(splits, config(path))
    path.unlink()
    with pytest.raises(UserError, match=r"images\.npz: cannot be read \(No such file or directory\)$"):
        with_generated(splits, config(path))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_outside_the_open_interval_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="generated_share"):
        DataConfig(generated_share=share)


def test_streamed_images_are_refused(splits: Splits, path: Path) -> None:
    streamed = replace(splits, train=stream("", [Entry("a", 0, 0, 0, 0)]))
    with pytest.raises(UserError, match=r"^generated is for images in memory, not for cifar10$"):
        with_generated(streamed, config(path))


def test_the_digest_depends_on_images_and_labels(splits: Splits, path: Path) -> None:
    others = {"image": IMAGES[::-1]}, {"label": LABELS[::-1].copy()}, {"image": IMAGES[:9], "label": LABELS[:9]}
    files = [path, *(write_arrays(path.with_name(f"{number}.npz"), **arrays) for number, arrays in enumerate(others))]
    digests = [with_generated(splits, config(file)).train.digest for file in files]
    assert len(set(digests)) == 4
    assert with_generated(splits, config(path)).train.digest == digests[0]


def test_an_error_of_the_disk_without_a_name_names_the_file(splits: Splits, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("advmoe.data.generated.map_npz", failing)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read \(No such device\)$"):
        with_generated(splits, config(path))
