import functools
import gc
import io
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from advmoe.config import DataConfig
from advmoe.data.images import Images, hold_out, limit
from advmoe.data.stream import SIDE, Entry, Streamed, centre_crop, random_crop, resized_crop, stream
from advmoe.errors import UserError

COUNT = 40  # more than one piece of a batch


def photo(number: int, width: int = 80, height: int = 60, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth random image."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, images: list[bytes]) -> Streamed:
    entries = []
    for row, data in enumerate(images):
        (folder / f"{row}.jpg").write_bytes(data)
        entries.append(Entry(f"{row}.jpg", 0, len(data), row % 4, (folder / f"{row}.jpg").stat().st_mtime_ns))
    return stream(str(folder), entries)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    """40 images of different sizes in 4 classes."""
    return write(tmp_path_factory.mktemp("images"), [photo(row, 60 + row, 50 + 3 * row) for row in range(COUNT)])


def batches(source: Streamed, rows: list[Any], seeds: list[int], **fields: Any) -> list[Images]:
    return list(source.augmented([np.array(indices) for indices in rows], seeds, DataConfig(**{"workers": 1} | fields)))


def same(first: list[Images], second: list[Images]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.raw, b.raw) and torch.equal(a.labels, b.labels) for a, b in pairs)


def worker_ids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


# Training batches


def test_batches_depend_on_rows_and_seeds_alone(images: Streamed) -> None:
    order = np.random.default_rng(5).permutation(COUNT)
    rows, seeds = [order[:36], order[36:], order[:3]], [2**62 + 1, 0, 7]
    expected = batches(images, rows, seeds)
    assert [batch.raw.shape for batch in expected] == [(36, 3, SIDE, SIDE), (4, 3, SIDE, SIDE), (3, 3, SIDE, SIDE)]
    assert [batch.labels.tolist() for batch in expected] == [images.labels[indices].tolist() for indices in rows]
    torch.manual_seed(3)
    np.random.seed(3)
    for workers in (2, 1, 2):
        assert same(batches(images, rows, seeds, workers=workers), expected)
    assert same(batches(images, rows[2:], seeds[2:]), expected[2:])


def test_crops_depend_on_the_seed_and_the_position_in_the_batch(images: Streamed) -> None:
    first, other = batches(images, [[5, 5, 5], [5, 5, 5]], [1, 2])
    raw = [*first.raw, *other.raw]
    assert len({image.numpy().tobytes() for image in raw}) == 6
    (moved,) = batches(images, [[9, 5, 9]], [1])
    assert torch.equal(moved.raw[1], first.raw[1])


def test_crops_differ_in_a_batch_of_more_than_one_piece(images: Streamed) -> None:
    (batch,) = batches(images, [[5] * 35], [1])
    assert len({image.numpy().tobytes() for image in batch.raw}) == 35


def test_flip_mirrors_about_half_and_can_be_switched_off(images: Streamed) -> None:
    (plain,) = batches(images, [range(COUNT)], [3], flip=False)
    (flipped,) = batches(images, [range(COUNT)], [3], flip=True)
    pairs = list(zip(plain.raw, flipped.raw, strict=True))
    unchanged = [torch.equal(a, b) for a, b in pairs]
    assert 10 <= sum(unchanged) <= 30
    assert [torch.equal(a.flip(2), b) for a, b in pairs] == [not same for same in unchanged]


def test_global_random_states_are_unchanged(images: Streamed) -> None:
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches(images, [[0, 1]], [3])
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_no_batches(images: Streamed) -> None:
    assert batches(images, [], []) == []


def test_rows_and_seeds_must_be_equally_many(images: Streamed) -> None:
    with pytest.raises(ValueError, match="zip"):
        batches(images, [[1], [2]], [1])


# Workers


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    before = worker_ids()
    yield
    gc.collect()
    assert worker_ids() <= before


@pytest.mark.usefixtures("no_workers_left")
@pytest.mark.parametrize("batches_taken", [1, 3])
def test_workers_end_with_the_iterator(images: Streamed, batches_taken: int) -> None:
    running = images.augmented([np.arange(8)] * 3, [1, 2, 3], DataConfig(workers=2))
    for _ in range(batches_taken):
        next(running)
    assert len(worker_ids()) >= 2
    del running


def test_workers_work_after_torch_used_threads(images: Streamed) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.rand(600, 600).mm(torch.rand(600, 600)).isfinite().all()
        assert len(batches(images, [range(8)], [0], workers=2)) == 1
    finally:
        torch.set_num_threads(threads)


def test_workers_can_be_spawned(images: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(images, [range(5)], [9])
    spawned = functools.partial(DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr("advmoe.data.stream.DataLoader", spawned)
    assert same(batches(images, [range(5)], [9]), expected)


KILLED = """
import multiprocessing, os, signal, sys
import numpy as np
import advmoe.data.stream as module
from advmoe.config import DataConfig
path = sys.argv[1]
status = os.stat(path)
images = module.stream("", [module.Entry(path, 0, status.st_size, 0, status.st_mtime_ns)])
concatenate = module._concatenate
def kill_worker(pieces):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    return concatenate(pieces)
module._concatenate = kill_worker
try:
    list(images.augmented([np.zeros(40, int)] * 50, list(range(50)), DataConfig(workers=1)))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_worker_that_is_killed_is_an_error_of_one_line(tmp_path: Path) -> None:
    """In a separate process, because torch raises the error at whatever line the process has reached.

    That must be a line of `augmented` or of what it calls, so `_concatenate` kills the worker.
    """
    (tmp_path / "0.jpg").write_bytes(photo(0))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "0.jpg")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("UserError a process that decodes images died (DataLoader worker (pid")
    assert result.stdout.count("\n") == 1


@pytest.mark.usefixtures("no_workers_left")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_image_is_named_by_its_file(tmp_path: Path, workers: int) -> None:
    data = photo(0)
    source = write(tmp_path, [data, data[: len(data) // 2], data])
    with pytest.raises(UserError) as caught:
        batches(source, [[0, 2], [0, 1]], [0, 1], workers=workers)
    text = str(caught.value)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/1\.jpg: not an image that can be decoded \(image file is truncated.*\)", text)
    with pytest.raises(UserError) as caught:
        source[torch.tensor([0, 1])]
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, it had "),
        (b"x" * 10_000, "not an image that can be decoded (none of "),
        (None, "cannot be read (No such"),
    ],
)
def test_an_image_that_changed_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = write(tmp_path, [photo(0)])
    path = tmp_path / "0.jpg"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        os.utime(path, ns=(0, int(source.files.modified[0])))
    with pytest.raises(UserError) as caught:
        source[torch.tensor([0])]
    assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(UserError) as in_worker:
        batches(source, [[0]], [1])
    assert str(in_worker.value) == str(caught.value)


def test_an_image_written_since_it_was_listed_is_refused_with_both_times(tmp_path: Path) -> None:
    source = write(tmp_path, [photo(0), photo(1)])
    path = tmp_path / "1.jpg"
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    source = replace(source, files=replace(source.files, modified=np.array([source.files.modified[0], path.stat().st_mtime_ns])))
    assert len(source[torch.tensor([0, 1])]) == 2
    path.write_bytes(path.read_bytes())  # content and size are the same, only the time differs
    os.utime(path, ns=(0, 1_700_000_001_000_000_000))
    with pytest.raises(UserError) as caught:
        source[torch.tensor([0, 1])]
    times = "modified at 2023-11-14T22:13:21.000000000 UTC, before at 2023-11-14T22:13:20.123456789 UTC"
    assert str(caught.value) == f"{path}: changed since the run began ({times})"
    with pytest.raises(UserError) as in_worker:
        batches(source, [[0, 1]], [1])
    assert str(in_worker.value) == str(caught.value)
    assert len(source[torch.tensor([0])]) == 1


def test_a_time_set_back_is_refused_too(tmp_path: Path) -> None:
    source = write(tmp_path, [photo(0)])
    os.utime(tmp_path / "0.jpg", ns=(0, 0))
    with pytest.raises(UserError, match=r"0\.jpg: changed since the run began \(modified at 1970-01-01T00:00:00\.0* UTC,"):
        source[torch.tensor([0])]


# Evaluation


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (300, 301), (60, 50), (1000, 90), (400, 400)])
def test_evaluation_resizes_to_256_and_crops_the_centre(width: int, height: int) -> None:
    data = photo(1, width, height, "PNG")
    with Image.open(io.BytesIO(data)) as image:
        scale = 256 / min(width, height)
        size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
        left, top = (round((side - SIDE) / 2) for side in size)
        expected = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + SIDE, top + SIDE))
    out = resized_crop(data, centre_crop, "here", shrink=False)
    assert min(size) == 256, scale
    assert np.abs(out.astype(int) - np.asarray(expected).transpose(2, 0, 1)).max() <= 1


def test_evaluated_images_are_those_requested(images: Streamed) -> None:
    index = torch.tensor([7, 0, 39])
    selected = images[index]
    assert selected.labels.tolist() == [3, 0, 3]
    assert (selected.raw.shape, selected.raw.dtype) == ((3, 3, SIDE, SIDE), torch.uint8)
    for row, image in zip(index.tolist(), selected.raw, strict=True):
        assert torch.equal(image, images[torch.tensor([row])].raw[0])
        expected = resized_crop(images.files.read(row), centre_crop, "here", shrink=False)
        assert np.array_equal(image, expected)


def test_pixels_are_all_images(images: Streamed) -> None:
    few = images.subset(torch.tensor([3, 1]))
    pixels = few.pixels()
    assert (pixels.shape, pixels.dtype) == ((2, 3, SIDE, SIDE), torch.float32)
    assert torch.equal((pixels * 255).round().to(torch.uint8), images[torch.tensor([3, 1])].raw)


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_other_colours_become_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    data = photo(2, 900, 700, kind, mode)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
    out = resized_crop(data, centre_crop, "here", shrink=False)
    assert np.abs(out.astype(int) - resized_crop(buffer.getvalue(), centre_crop, "here", shrink=False)).max() <= 1
    (batch,) = batches(write(tmp_path, [data]), [[0]], [0])
    assert batch.raw.shape == (1, 3, SIDE, SIDE)


# Parts


def test_subsets_select_images(images: Streamed) -> None:
    part = images.subset(images.labels == 2).subset(torch.tensor([4, 0]))
    assert (len(part), part.labels.tolist()) == (2, [2, 2])
    assert torch.equal(part[torch.tensor([0, 1])].raw, images[torch.tensor([18, 2])].raw)
    assert same(batches(part, [[1, 0]], [4]), batches(images, [[2, 18]], [4]))
    assert part.files is images.files


def test_hold_out_and_limit_choose_the_rows_that_they_choose_in_memory(images: Streamed) -> None:
    memory = Images(torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None], images.labels)
    for part, expected in zip(hold_out(images, 0.2), hold_out(memory, 0.2), strict=True):
        assert part.rows.tolist() == expected.raw.flatten().tolist()
        assert torch.equal(part.labels, expected.labels)
    assert limit(images, 9).rows.tolist() == limit(memory, 9).raw.flatten().tolist()
    assert limit(images, None) is images


def test_the_index_takes_few_bytes_an_image() -> None:
    names = (Entry(f"train/n{row % 1000:08d}/n{row % 1000:08d}_{row:06d}.JPEG", 0, 110_000, row % 1000, 7) for row in range(50_000))
    listed = stream("data", names)
    files = listed.files
    arrays = [files.text, files.ends, files.offsets, files.sizes, files.modified, listed.rows, listed.labels.numpy()]
    assert sum(array.nbytes for array in arrays) / 50_000 == 37 + 6 * 8
    assert all(array.dtype in (np.uint8, np.int64) for array in arrays)
    assert listed.files.name(12_345) == "train/n00000345/n00000345_012345.JPEG"
    assert listed.subset(torch.arange(0, 50_000, 2)).files is listed.files


def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xc3\xa9 \xff.jpg")
    (tmp_path / name).write_bytes(photo(0))
    source = stream(str(tmp_path), [Entry("a", 0, 1, 0, 0), Entry(name, 0, len(photo(0)), 1, (tmp_path / name).stat().st_mtime_ns)])
    assert source.files.name(1) == name
    assert len(source[torch.tensor([1])]) == 1


# Crops


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (300, 600)])
def test_random_crops_have_the_standard_range(width: int, height: int) -> None:
    random = np.random.default_rng(0)
    boxes = np.array([random_crop(width, height, random) for _ in range(4000)])
    across, down = (boxes[:, 2:] - boxes[:, :2]).T
    share, shape = across * down / (width * height), across / down
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    rounding = 2 / min(across.min(), down.min())
    assert 0.08 * (1 - rounding) <= share.min() < 0.1
    assert 0.75 * (1 - rounding) <= shape.min() < shape.max() <= 4 / 3 * (1 + rounding)
    assert shape.max() > 1.3
    small = share < 0.4  # always fits: the shares are uniform there, and the logarithm of the shape too
    assert abs(share[small].mean() - 0.24) < 0.01
    assert abs(np.log(shape[small]).mean()) < 0.02
    left_over = np.array([width - across, height - down]).T - 2 * boxes[:, :2]  # of which half lies on either side
    assert np.abs(left_over[small].mean(0)).max() < 0.03 * max(width, height)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 50), (0, 24, 1, 25)), ((1, 1), (0, 0, 1, 1))],
)
def test_an_image_that_no_crop_fits_gives_its_middle(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert random_crop(*size, np.random.default_rng(0)) == expected


SHRINKS = {  # a crop of a 1800 x 1400 image, and the size at which the image has to be decoded
    (0, 0, 1792, 1400): (450, 350),
    (7, 9, 7 + 896, 9 + 896): (450, 350),
    (7, 9, 7 + 895, 9 + 1000): (900, 700),
    (901, 301, 901 + 448, 301 + 448): (900, 700),
    (901, 301, 901 + 447, 301 + 448): (1800, 1400),
    (901, 301, 901 + 100, 301 + 60): (1800, 1400),
}


@pytest.mark.parametrize("box", SHRINKS)
def test_a_jpeg_is_shrunk_while_its_crop_keeps_224_pixels(box: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded = photo(3, 1800, 1400), []

    def record_size(image: Image.Image, where: str) -> Image.Image:
        decoded.append(image.size)
        return image.convert("RGB")

    monkeypatch.setattr("advmoe.data.stream.to_rgb", record_size)
    full, shrunk = (resized_crop(data, lambda width, height: box, "here", shrink=shrink) for shrink in (False, True))
    assert decoded == [(1800, 1400), SHRINKS[box]]
    assert np.abs(full.astype(int) - shrunk).mean() < 1


def test_to_a_device_keeps_the_rows(images: Streamed) -> None:
    moved = images.to(torch.device("cpu"))
    assert torch.equal(moved.labels, images.labels)
    assert moved.rows is images.rows
    assert replace(moved).files is images.files
