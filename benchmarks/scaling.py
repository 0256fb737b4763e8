"""Weak scaling: images a second of K processes, each with its own part of a batch K times as large, beside one process.

    python benchmarks/scaling.py --processes 1 2 --out benchmarks/results/scaling.json

Every process has one thread (on CUDA: one device). `advmoe train` runs under torchrun, as a person starts it; the number of
processes changes from one run to the next, and the seconds of an iteration are those of the second epoch's mean.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from advmoe.benchmark.rows import Found, compared, write_found

METHODS = ("at_dense", "advmoe")
IMAGES = 640  # of each process and epoch
BATCH = 64  # of each process


def images_per_second(method: str, processes: int, width: int, *flags: str) -> float:
    """One run's, over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "advmoe", "train"]
        setting = {
            "recipe": f"fashion-mnist-resnet18-{method}", "width": width, "limit-train": IMAGES * processes, "limit-test": 20,
            "batch-size": BATCH * processes, "epochs": 2, "tied-share": 0.0, "threads": 1, "out": run,
        }  # fmt: skip
        words = [word for name, value in setting.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, *launch, *words, *flags], check=True, capture_output=True)
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return float(IMAGES * processes / row["train_seconds"])


def measured(method: str, processes: list[int], rounds: int, width: int) -> Found:
    """All numbers of processes in turn, round by round; several with and without common statistics."""
    variants: dict[str, tuple[int, tuple[str, ...]]] = {
        f"{count} processes" if count > 1 else "1 process": (count, ()) for count in processes
    }
    variants |= {f"{count} processes, --no-sync-norm": (count, ("--no-sync-norm",)) for count in processes if count > 1}
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (count, flags) in variants.items():
            speeds[name].append(images_per_second(method, count, width, *flags))
    first, *others = speeds
    title = f"{method}, ResNet-18 of width {width}, batch {BATCH} a process"
    return compared("scaling", title, "images_per_second", speeds, [(other, first, None) for other in others])


def main() -> None:
    """Measure, print the ratios and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    for method in METHODS:
        found.append(measured(method, arguments.processes, arguments.rounds, arguments.width))
        speeds = {name: round(median(values), 1) for name, values in found[-1].measured.items()}
        print(found[-1].title, speeds, *found[-1].rows, sep="\n", flush=True)
    if arguments.out is not None:
        write_found(arguments.out, found)


if __name__ == "__main__":
    main()
