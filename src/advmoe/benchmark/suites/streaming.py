"""Streamed images: memory of an epoch by number of images, and speed compared with plain decoding. About 5 minutes, Linux only.

Images are smooth noise as JPEG files. At most DISTINCT files are written; the other names are hard links to them.
"""

import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from advmoe.benchmark.process import run_in_process
from advmoe.benchmark.rows import Ratio, Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.config import DataConfig
from advmoe.data.imagenet import load
from advmoe.data.images import Source
from advmoe.data.stream import SIDE, Streamed, random_crop, resized_crop

QUALITY = 90
SIZES = ((500, 375), (1000, 750), (2000, 1500))  # width, height; the first is typical of ImageNet
COUNTS = (1000, 10_000)  # training images of each epoch
DISTINCT, CROPS = 500, 40
WORKERS, BATCH, ROUNDS = 2, 128, 5


def measure(setup: Setup) -> Iterator[Row]:
    """Memory and speed of full epochs, then the speed of crops."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for count in (30, 60) if setup.quick else COUNTS:
                folder = Path(scratch) / str(count)
                make_folder(folder, count, min(count, 20) if setup.quick else DISTINCT)
                (epoch,) = run_in_process(run_epoch, EpochTask(folder=str(folder)), Epoch)
                case = f"one epoch of {count} images, {WORKERS} workers"
                yield Row(suite="streaming", case=case, what="peak memory, shared pages once", value=epoch.pss, unit="bytes")
                yield Row(suite="streaming", case=case, what="peak memory, sum of processes", value=epoch.rss, unit="bytes")
                rate = epoch.images / epoch.seconds
                yield Row(suite="streaming", case=case, what="speed", value=rate, unit="images/s")
            yield from decoding(folder, setup)
        yield from crop_rows(setup)
    finally:
        torch.set_num_threads(usual)


# Images


def photo(number: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of noise at several scales. As in photographs, coarse structure is strong and fine structure is weak."""
    random = np.random.default_rng(number)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (12, 30), (40, 14), (120, 6), (max(width, height), 2)):
        coarse = random.normal(0, strength, (cells * height // width + 1, cells, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float32) - 128
    buffer = io.BytesIO()
    Image.fromarray((total + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_folder(folder: Path, count: int, distinct: int) -> None:
    """Write `count` training images in 10 classes, and 2 of each class for validation. Only `distinct` of them differ."""
    files: list[Path] = []
    for number in range(count + 20):
        part, row = ("train", number) if number < count else ("val", number - count)
        path = folder / part / f"n{row % 10:08d}" / f"image_{row:07d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(files) < distinct:
            path.write_bytes(photo(number))
            files.append(path)
        else:
            os.link(files[number % len(files)], path)


# Memory


class EpochTask(BaseModel):
    """One epoch of the images in a folder."""

    folder: str


class Epoch(BaseModel):
    """The number of images of an epoch, its seconds, and the peak memory in bytes of the process and its workers."""

    images: int
    seconds: float
    rss: float
    pss: float


def run_epoch(task: EpochTask) -> Iterator[Epoch]:
    """One epoch in this process."""
    torch.set_num_threads(1)
    config = DataConfig(dataset="imagenet", data_dir=task.folder, workers=WORKERS)
    with peak_memory() as peak:
        train = load(config).train
        started = time.perf_counter()
        images = one_pass(train, config)
        seconds = time.perf_counter() - started
    yield Epoch(images=images, seconds=seconds, rss=peak["Rss"], pss=peak["Pss"])


def one_pass(train: Source, config: DataConfig) -> int:
    """Augment every image once. Returns the number of images."""
    order = np.random.default_rng(0).permutation(len(train))
    rows = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return sum(len(batch) for batch in train.augmented(rows, range(len(rows)), config))


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peak memory inside the block in bytes, read every 20 ms from /proc. `Rss` counts shared pages once for each process, `Pss`
    divides them by the number of processes."""
    peak, over = {"Rss": 0.0, "Pss": 0.0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            now = memory([os.getpid(), *children(os.getpid())])
            peak.update({name: max(value, now[name]) for name, value in peak.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def memory(pids: Sequence[int]) -> dict[str, float]:
    """The memory of all these processes together, in bytes."""
    total = {"Rss": 0.0, "Pss": 0.0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # a worker that has just ended
            continue
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
        total = {name: size + sizes.get(name, 0) for name, size in total.items()}
    return total


# Speed


def decoding(folder: Path, setup: Setup) -> Iterator[Row]:
    """Images per second and core: streaming with one worker and with two, and plain Pillow on the same files."""
    train = load(DataConfig(dataset="imagenet", data_dir=str(folder), limit_train=1000)).train
    assert isinstance(train, Streamed)
    paths = [train.files.where(int(row)) for row in train.rows]
    calls = {
        "plain": partial(plain, paths),
        "streamed, 1 worker": partial(one_pass, train, DataConfig(workers=1)),
        "streamed, 2 workers": partial(one_pass, train, DataConfig(workers=2)),
    }
    rates = rates_of(calls, setup)
    rates["streamed, 2 workers"] = [rate / 2 for rate in rates["streamed, 2 workers"]]
    ratios: list[Ratio] = [(name, "plain", None) for name in calls if name != "plain"]
    yield from compare("streaming", "images a second and core", "images/s", rates, ratios)


def plain(paths: Sequence[str]) -> int:
    """Decode each image in full, then crop and resize it in the same way, one image after another."""
    for number, path in enumerate(paths):
        random = np.random.default_rng(number)
        with Image.open(path) as image:
            box = random_crop(*image.size, random)
            np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
    return len(paths)


def rates_of(calls: Mapping[str, Callable[[], int]], setup: Setup) -> dict[str, list[float]]:
    """Images per second of each call. Every round runs all calls once; the first round is a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(setup.rounds(ROUNDS) + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            images = call()
            if number > 0:
                rates[name].append(images / (time.perf_counter() - started))
    return rates


def crop_rows(setup: Setup) -> Iterator[Row]:
    """The speed-up from shrinking images while decoding, and the difference of the pixels from those of full decoding."""
    for width, height in SIZES[:1] if setup.quick else SIZES:
        images = [photo(number, width, height) for number in range(2 if setup.quick else CROPS)]
        case = f"random crops of {width} x {height}"
        calls = {"full decoding": partial(crop_all, images, False), "shrunk while decoding": partial(crop_all, images, True)}
        ratio: Ratio = ("shrunk while decoding", "full decoding", None)
        yield from compare("streaming", case, "images/s", rates_of(calls, setup), [ratio])
        full, shrunk = (crops(images, shrink) for shrink in (False, True))
        gaps = [abs(a.astype(int) - b).mean() for a, b in zip(full, shrunk, strict=True)]
        different = [gap for gap in gaps if gap]
        share = 100 * len(different) / len(images)
        yield Row(suite="streaming", case=case, what="share shrunk", value=share, unit="%")
        if different:
            gap = 100 * float(np.mean(different)) / 255
            yield Row(suite="streaming", case=case, what="mean difference of shrunk pixels", value=gap, unit="%")


def crop_all(images: Sequence[bytes], shrink: bool) -> int:
    """Crop every image. Returns the number of images."""
    return len(crops(images, shrink))


def crops(images: Sequence[bytes], shrink: bool) -> list[np.ndarray]:
    """A random crop of each image."""

    def crop(number: int) -> Callable[[int, int], tuple[float, float, float, float]]:
        return lambda width, height: random_crop(width, height, np.random.default_rng(number))

    return [resized_crop(data, crop(number), "image", shrink=shrink) for number, data in enumerate(images)]
