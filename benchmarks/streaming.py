"""Streamed images: memory of one epoch against the number of images, and speed beside plain decoding.

    python benchmarks/streaming.py --images 1000 10000 --out benchmarks/results/streaming.json

Images are smooth noise as JPEG. At most --distinct of them are made; further names are hard links to these.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features

from advmoe.config import DataConfig
from advmoe.data.imagenet import load
from advmoe.data.stream import SIDE, Streamed, random_crop, resized_crop
from advmoe.files import write_json

QUALITY = 90
SIZES = ((500, 375), (1000, 750), (2000, 1500))  # width, height; ImageNet's images are most like the first


def main() -> None:
    arguments = parsed()
    if arguments.epoch is not None:
        print(json.dumps(epoch(arguments.epoch, arguments.workers, arguments.batch_size)))
        return
    torch.set_num_threads(1)
    found: dict[str, Any] = {"setting": setting(arguments), "memory": [], "crops": crop_speeds(arguments.repeats)}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for count in arguments.images:
            place = Path(scratch) / str(count)
            made = make_folder(place, count, arguments.distinct)
            found["memory"].append({"images": count, "distinct": made, **subprocess_epoch(place, arguments)})
        found["speed"] = speed(place, arguments)
    write_json(arguments.out, found, indent=1)
    print(table(found))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="training images of each epoch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--distinct", type=int, default=500, help="images made; the others are hard links")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", help="folder for the images while it runs")
    parser.add_argument("--epoch", type=Path, help=argparse.SUPPRESS)  # what a subprocess does
    return parser.parse_args()


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cores": os.cpu_count(), "processor": processor(), "python": platform.python_version(), "torch": torch.__version__,
        "pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo"), "numpy": np.__version__,
        "workers": arguments.workers, "batch_size": arguments.batch_size, "repeats": arguments.repeats, "quality": QUALITY,
    }  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# Images


def photo(number: int, width: int = 500, height: int = 375) -> bytes:
    """Noise at several scales, strong where coarse and weak where fine, as photographs have it."""
    random = np.random.default_rng(number)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (12, 30), (40, 14), (120, 6), (max(width, height), 2)):
        coarse = random.normal(0, strength, (cells * height // width + 1, cells, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float32) - 128
    buffer = io.BytesIO()
    Image.fromarray((total + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_folder(place: Path, count: int, distinct: int) -> int:
    """`count` training names in 10 classes and 2 of each for validation; gives how many images differ."""
    made: list[Path] = []
    for number in range(count + 20):
        part, row = ("train", number) if number < count else ("val", number - count)
        path = place / part / f"n{row % 10:08d}" / f"image_{row:07d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(made) < distinct:
            path.write_bytes(photo(number))
            made.append(path)
        else:
            os.link(made[number % len(made)], path)
    return len(made)


# Memory


def subprocess_epoch(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--epoch", str(place), "--workers", str(arguments.workers)]
    command += ["--batch-size", str(arguments.batch_size)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def epoch(place: Path, workers: int, batch_size: int) -> dict[str, Any]:
    """One epoch in this process: peak memory of it and its workers together, and images per second."""
    torch.set_num_threads(1)
    config = DataConfig(dataset="imagenet", data_dir=str(place), workers=workers)
    with peak_memory() as peak:
        train = load(config).train
        started = time.perf_counter()
        seen = one_pass(train, batch_size, config)
        seconds = time.perf_counter() - started
    return {"seen": seen, "images_per_second": seen / seconds, **peak}


def one_pass(train: Any, batch_size: int, config: DataConfig) -> int:
    order = np.random.default_rng(0).permutation(len(train))
    rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(len(batch) for batch in train.augmented(rows, range(len(rows)), config))


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peaks in MB over the block, looked up every 20 ms in /proc: `rss_mb` counts pages that processes share in each of
    them, `pss_mb` shares them out."""
    peak, over = {"rss_mb": 0.0, "pss_mb": 0.0}, threading.Event()

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
    total = {"rss_mb": 0.0, "pss_mb": 0.0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # a worker that has just ended
            continue
        held = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:] if line.endswith("kB")}
        total["rss_mb"] += held.get("Rss", 0)
        total["pss_mb"] += held.get("Pss", 0)
    return total


# Speed


def speed(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second and core of streaming with one worker and two, and of plain Pillow on the same files, in turns."""
    config = DataConfig(dataset="imagenet", data_dir=str(place), limit_train=1000)
    train = load(config).train
    assert isinstance(train, Streamed)
    paths = [train.files.where(int(row)) for row in train.rows]
    ways: dict[str, Callable[[], int]] = {
        "plain": lambda: plain(paths),
        "streamed, 1 worker": lambda: one_pass(train, arguments.batch_size, DataConfig(workers=1)),
        "streamed, 2 workers": lambda: one_pass(train, arguments.batch_size, DataConfig(workers=2)),
    }
    cores = {"streamed, 2 workers": 2}
    return {
        name: spread([rate / cores.get(name, 1) for rate in rates]) for name, rates in interleaved(ways, arguments.repeats).items()
    }


def plain(paths: Sequence[str]) -> int:
    """Full decoding, the same crop and resizing, one image after another."""
    for number, path in enumerate(paths):
        random = np.random.default_rng(number)
        with Image.open(path) as image:
            box = random_crop(*image.size, random)
            np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
    return len(paths)


def interleaved(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Units per second of each way, all of them once in every round; a first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            done = way()
            if turn:
                rates[name].append(done / (time.perf_counter() - started))
    return rates


def crop_speeds(repeats: int, count: int = 40) -> list[dict[str, Any]]:
    """What shrinking while decoding gains, and how far its pixels are from those of full decoding (mean absolute, of 255)."""
    found = []
    for width, height in SIZES:
        images = [photo(number, width, height) for number in range(count)]
        full, shrunk = (crops(images, shrink) for shrink in (False, True))
        away = [abs(a.astype(int) - b).mean() for a, b in zip(full, shrunk, strict=True)]
        differing = [distance for distance in away if distance]
        ways: dict[str, Callable[[], int]] = {
            "full": partial(crop_all, images, False),
            "shrunk": partial(crop_all, images, True),
        }
        rates = {name: spread(values) for name, values in interleaved(ways, repeats).items()}
        found.append({
            "size": [width, height], **rates, "shrunk_share": len(differing) / count,
            "mean_difference": float(np.mean(differing)) if differing else None,
        })  # fmt: skip
    return found


def crop_all(images: Sequence[bytes], shrink: bool) -> int:
    return len(crops(images, shrink))


def crops(images: Sequence[bytes], shrink: bool) -> list[np.ndarray]:
    def crop(number: int) -> Callable[[int, int], tuple[float, float, float, float]]:
        return lambda width, height: random_crop(width, height, np.random.default_rng(number))

    return [resized_crop(data, crop(number), "image", shrink=shrink) for number, data in enumerate(images)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def table(found: dict[str, Any]) -> str:
    def shown(value: dict[str, float]) -> str:
        return f"{value['median']:7.0f} ({value['least']:.0f} to {value['most']:.0f})"

    lines = ["one epoch: images, peak MB of all processes (shared pages once), sum of RSS, images/s"]
    lines += [f"{m['images']:9,} {m['pss_mb']:9.0f} {m['rss_mb']:9.0f} {m['images_per_second']:9.0f}" for m in found["memory"]]
    lines += ["images/s per core", *(f"{name:20} {shown(value)}" for name, value in found["speed"].items())]
    lines += ["random crops per second: full decoding, shrunk while decoding; share shrunk, their mean difference of 255"]
    for row in found["crops"]:
        away = "" if row["mean_difference"] is None else f"{row['mean_difference']:.2f}"
        lines += [
            f"{row['size'][0]} x {row['size'][1]:<5} {shown(row['full'])} {shown(row['shrunk'])} {row['shrunk_share']:.0%} {away}"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
