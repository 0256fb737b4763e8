"""Measure bfloat16 against float32: the loss curve of the demo's AdvMoE training, and the time of an iteration.

    python scripts/measure_precision.py [--seeds 3] [--iterations 200] [--rounds 3] [--device cpu]

Both precisions train in turn, seed by seed; ResNet-18's iterations (batch 128) are interleaved too.
Times are wall and processor time: with one thread the latter tells the same where others use the machine.
Writes results/precision.json.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from advmoe.config import Precision, RunConfig, RuntimeConfig
from advmoe.data import ImageSpec, Splits, load_dataset
from advmoe.evaluation.record import provenance
from advmoe.files import write_json
from advmoe.recipes import recipe
from advmoe.training import start
from advmoe.training.loop import train
from advmoe.training.methods import METHODS
from advmoe.training.steps import Metrics

TARGET = Path(__file__).parents[1] / "results/precision.json"
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
WINDOW = 20  # iterations in a running mean
PHASE = METHODS["advmoe"].phases[0]
CIFAR = ImageSpec(tuple(map(str, range(10))), (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


class Curve:
    """A training Listener that keeps each iteration's loss and seconds; an epoch's first has no seconds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[list[float]] = []
        self.sum, self.since = 0.0, clocks()

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        loss, size = sums["loss"].item(), images / done  # but for the last batch, which may be smaller
        self.losses.append((loss - (self.sum if done > 1 else 0.0)) / size)
        if done > 1:
            self.seconds.append(passed(self.since))
        self.sum, self.since = loss, clocks()

    def epoch(self, row: Any) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def clocks() -> list[float]:
    """Wall and processor time."""
    return [time.perf_counter(), time.process_time()]


def passed(since: list[float]) -> list[float]:
    """Seconds by both."""
    return [now - then for now, then in zip(clocks(), since, strict=True)]


def summary(seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians, and float32's over bfloat16's with the spread over rounds."""
    told: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "processor")):
        times = {name: [row[place] for row in rows] for name, rows in seconds.items()}
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        told[clock] = {
            "seconds": {name: median(values) for name, values in times.items()},
            "float32_over_bfloat16": median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    return told


def curves(config: RunConfig, splits: Splits, iterations: int) -> dict[str, Curve]:
    """One seed's training in one precision and then the other."""
    found: dict[str, Curve] = {}
    for precision in PRECISIONS:
        found[precision] = Curve()
        with tempfile.TemporaryDirectory() as folder:
            train(replace(config, runtime=RuntimeConfig(precision=precision)), splits, Path(folder) / "run", found[precision])
        del found[precision].losses[iterations:], found[precision].seconds[iterations:]
    return found


def demo(seeds: int, iterations: int, device: torch.device) -> dict[str, Any]:
    """Curves and times of the demo's recipe."""
    config = recipe("demo-advmoe")
    splits = load_dataset(config.data).to(device)
    epochs = math.ceil(iterations / math.ceil(len(splits.train) / config.training.batch_size))
    config = replace(config, training=replace(config.training, epochs=epochs))
    found: dict[str, list[Curve]] = {precision: [] for precision in PRECISIONS}
    for seed in range(seeds):
        for precision, curve in curves(replace(config, seed=seed), splits, iterations).items():
            found[precision].append(curve)
            processor = np.median(curve.seconds, axis=0)[1]
            print(f"seed {seed} {precision}: last loss {curve.losses[-1]:.3f}, {processor:.3f} processor s/it", flush=True)
    return compared({precision: [curve.losses for curve in own] for precision, own in found.items()}) | {
        "seeds": seeds,
        "iterations": iterations,
        "time": summary(
            {precision: [np.mean(curve.seconds, axis=0).tolist() for curve in own] for precision, own in found.items()}
        ),
    }


def compared(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Running means over WINDOW iterations: gaps between the precisions' means over seeds, beside the deviation between seeds
    of one precision (pooled over both and over the iterations), and the standard error of such a gap that follows from it."""
    kernel = np.full(WINDOW, 1 / WINDOW)
    smooth = {name: np.array([np.convolve(row, kernel, "valid") for row in rows]) for name, rows in losses.items()}
    means = {name: rows.mean(axis=0) for name, rows in smooth.items()}
    gap = np.abs(means["float32"] - means["bfloat16"])
    deviation = math.sqrt(np.mean([rows.var(axis=0, ddof=1) for rows in smooth.values()])) if len(smooth["float32"]) > 1 else 0.0
    return {
        "largest_gap": float(gap.max()),
        "mean_gap": float(gap.mean()),
        "deviation_between_seeds": deviation,
        "standard_error_of_gap": deviation * math.sqrt(2 / len(smooth["float32"])),
        "last_running_mean": {name: float(mean[-1]) for name, mean in means.items()},
        "running_mean": {name: [round(value, 4) for value in mean.tolist()] for name, mean in means.items()},
    }


def resnet18(rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of an AdvMoE iteration of ResNet-18 at batch 128, interleaved, and float32's over bfloat16's in each round."""
    calls: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        config = replace(recipe("cifar10-resnet18-advmoe"), runtime=RuntimeConfig(precision=precision))
        state = start.train_state(config, start.network(config, CIFAR).to(device), PHASE)
        torch.manual_seed(0)
        batches = {
            level: (torch.rand(128, *CIFAR.shape, device=device), torch.randint(0, 10, (128,), device=device))
            for level in PHASE.levels
        }
        calls[precision] = partial(PHASE.step, state, batches)
    seconds: dict[str, list[list[float]]] = {precision: [] for precision in PRECISIONS}
    for _ in range(rounds):
        for name, call in calls.items():
            started = clocks()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(passed(started))
        print("ResNet-18: " + "  ".join(f"{name} {rows[-1][1]:.2f} processor s" for name, rows in seconds.items()), flush=True)
    return {"time": summary({name: rows[1:] for name, rows in seconds.items()})}  # the first round warms up


def main() -> None:
    """Measure both; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    large = resnet18(arguments.rounds, device)
    small = demo(arguments.seeds, arguments.iterations, device)
    for name, found in (("demo", small), ("ResNet-18", large)):
        for clock, told in found["time"].items():
            print(f"{name}: float32 / bfloat16, {clock} time: {told['float32_over_bfloat16']:.2f} ({told['spread']})")
    print(f"running means differ by {small['largest_gap']:.3f} at most; seeds deviate by {small['deviation_between_seeds']:.3f}")
    write_json(TARGET, {"demo": small, "resnet18": large, "threads": torch.get_num_threads(), **provenance()}, indent=1)


if __name__ == "__main__":
    main()
