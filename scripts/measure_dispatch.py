"""Which dispatch is fastest for a layer's shape, batch and phase? Variants interleaved, medians.

    python scripts/measure_dispatch.py --threads 2 --out results/dispatch.json

`fastest` in advmoe/moe/dispatch/choice.py is a rule taken from these figures. Its threshold is that of the demo's AdvMoE iteration,
where layers meet cold caches: timed last, under several of them (0 splits wherever filters are fixed).
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from advmoe.benchmark import variants
from advmoe.benchmark.rows import machine
from advmoe.benchmark.timing import timed
from advmoe.files import write_json
from advmoe.moe.dispatch import choice, run_chosen
from advmoe.moe.experts import FilterBank
from advmoe.recipes import recipe

CPU = torch.device("cpu")
THRESHOLDS = (0, 100_000, 200_000, 400_000, 600_000)
NAMES = ("split", "wide", "grouped")
LAYERS = [(8, 4, 28), (16, 8, 14), (32, 16, 7), (64, 32, 32), (64, 64, 16), (128, 128, 8), (256, 256, 4)]  # C, K, height
BATCHES = (1, 2, 8, 32, 128)
EXPERTS = (2, 8)
PHASES = ("forward", "attack", "routers", "weights")  # what gets a gradient: nothing, x, x and the route, x and the bank


def call(own: FilterBank, x: Tensor, experts: Tensor, phase: str) -> Callable[[], object]:
    """One pass of a layer as the phase runs it."""
    x = x.clone().requires_grad_(phase != "forward")
    bank = own.filters.clone().requires_grad_(phase == "weights")
    one_hot = torch.nn.functional.one_hot(experts, len(own.starts)).float().requires_grad_() if phase == "routers" else None
    wanted = [t for t in (x, bank, one_hot) if t is not None and t.requires_grad]
    layer = FilterBank(bank, own.starts, own.width, own.stride, None, own.dispatch)

    def run() -> None:
        y = run_chosen(x, layer, experts, one_hot)
        if wanted:
            torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """One row a setting."""
    for (inputs, width, size), batch, num_experts, phase in product(LAYERS, BATCHES, EXPERTS, PHASES):
        x, bank = torch.randn(batch, inputs, size, size), torch.randn(num_experts * width, inputs, 3, 3)
        experts = torch.arange(batch) % num_experts
        starts = tuple(range(0, num_experts * width, width))
        calls = {name: call(FilterBank(bank, starts, width, 1, None, name), x, experts, phase) for name in NAMES}
        yield {
            "in_channels": inputs, "width": width, "size": size, "batch": batch, "num_experts": num_experts, "phase": phase,
            "ms": medians(timed(calls, rounds, CPU)),
        }  # fmt: skip


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds."""
    return {name: 1000 * median(values) for name, values in seconds.items()}


def thresholds(rounds: int) -> dict[str, float]:
    """Milliseconds of the demo's AdvMoE iteration, by the number of filter values up to which `auto` groups."""
    config = recipe("demo-advmoe")
    config = replace(config, training=replace(config.training, tied_share=0.0))
    step = variants.iteration(config, 28, CPU)

    def under(limit: int) -> Callable[[], object]:
        def run() -> None:
            choice.GROUPED_UP_TO = limit
            step()

        return run

    return medians(timed({str(limit): under(limit) for limit in THRESHOLDS}, rounds, CPU))


def main() -> None:
    """Measure, print the fastest of each setting and keep everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for row in rows(arguments.rounds):
        found.append(row)
        ms = row["ms"]
        best = min(ms, key=ms.__getitem__)
        print(*(f"{row[name]:>8}" for name in row if name != "ms"), *(f"{ms[name]:9.3f}" for name in NAMES), best, flush=True)
    limits = thresholds(2 * arguments.rounds)
    print("demo's iteration by threshold:", *(f"{limit}: {ms:.0f} ms" for limit, ms in limits.items()), sep="\n  ")
    if arguments.out is not None:
        write_json(arguments.out, {"machine": machine(), "rows": found, "thresholds": limits})


if __name__ == "__main__":
    main()
