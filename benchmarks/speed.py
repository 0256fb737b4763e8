"""Is the network as fast as its cost says? Inference, iterations and attacks, as ratios of variants interleaved in one run.

    python benchmarks/speed.py --threads 2 --out benchmarks/results/speed.json

All networks get the same treatment: inference on batch norms folded in, in torch.inference_mode, channels last; iterations as
`advmoe train` runs them. Routes are random and even, the dispatch's hardest case.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from advmoe.attacks import Pgd, PictureDraws, pgd
from advmoe.config import ModelConfig
from advmoe.data import PictureSpec
from advmoe.models import Classifier, build_model, fused
from advmoe.moe import HARD, DenseKind, Gate, MoEKind
from advmoe.recipes import recipe
from advmoe.training import loop
from advmoe.training.methods import METHODS

Calls = dict[str, Callable[[], object]]
SPEC = PictureSpec(tuple(str(number) for number in range(10)), (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
KINDS = {
    "dense": DenseKind(),
    "small_dense": DenseKind(0.5),
    "moe_2": MoEKind(0.5, 2, norms="per_expert"),
    "moe_16": MoEKind(0.5, 16, "disjoint", norms="per_expert"),
}


def settled(model: Classifier) -> Classifier:
    """Experts that differ and batch norms that have seen something, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.05)
        model.train()(torch.rand(32, *SPEC.shape))
    return model.eval()


def routed(model: Classifier, batch: int) -> Gate:
    """An even random route, where there is anything to route."""
    layers = model.moe_layers()
    return Gate("forced", route=torch.randint(0, layers[0].num_experts, (batch, len(layers)))) if layers else HARD


@torch.inference_mode()
def forward(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """Logits over random routes."""
    return model.forward_routed(x, routed(model, len(x)))[0]


def inference(backbone: str, batch: int, kinds: list[str]) -> Calls:
    """A forward pass of each kind."""
    x = torch.rand(batch, *SPEC.shape).contiguous(memory_format=torch.channels_last)
    calls: Calls = {}
    for kind in kinds:
        twin = fused(settled(build_model(ModelConfig(backbone), KINDS[kind], SPEC)))
        twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls[kind] = partial(forward, twin, x)
    return calls


def iterations(batch: int) -> Calls:
    """A training iteration of each method on ResNet-18."""
    calls: Calls = {}
    for method in ("at_dense", "at_small_dense", "advmoe"):
        config = recipe(f"cifar10-resnet18-{method}")
        phase = METHODS[method].phases[0]
        state = loop._state(config, settled(loop.network(config, SPEC)), phase)
        for group in (group for optimizer in state.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = 1e-4
        batches = {level: (torch.rand(batch, *SPEC.shape), torch.randint(0, 10, (batch,))) for level in phase.levels}
        calls[method] = partial(phase.step, state, batches)
    return calls


def attacks(batch: int, steps: int) -> Calls:
    """PGD of each kind through the hard gate."""
    x, y, settings = torch.rand(batch, *SPEC.shape), torch.randint(0, 10, (batch,)), Pgd(8 / 255, 2 / 255, steps)
    calls: Calls = {}
    for kind in ("small_dense", "moe_2"):
        twin = fused(settled(build_model(ModelConfig(), KINDS[kind], SPEC)))
        calls[kind] = partial(pgd, twin, x, y, settings, PictureDraws(0, range(batch)))
    return calls


def timed(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, interleaved; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


TABLES: dict[str, tuple[Callable[[], Calls], int, list[tuple[str, str, str]]]] = {
    # name: what is timed, how often, and the ratios with their targets
    "ResNet-18, batch 64": (
        lambda: inference("resnet18", 64, list(KINDS)), 15,
        [("dense", "moe_2", ">= 3.0"), ("moe_2", "small_dense", "<= 1.3"), ("moe_16", "moe_2", "<= 1.4")],
    ),
    "ResNet-18, batch 1": (lambda: inference("resnet18", 1, ["dense", "small_dense", "moe_2"]), 60, [("dense", "moe_2", ">= 1.8")]),
    "WRN-28-10, batch 64": (lambda: inference("wrn28_10", 64, ["dense", "moe_2"]), 3, [("dense", "moe_2", ">= 3.3")]),
    "iteration, batch 128": (
        lambda: iterations(128), 4, [("advmoe", "at_dense", "<= 0.75"), ("advmoe", "at_small_dense", "<= 2.9")],
    ),
    "PGD-50, batch 32": (lambda: attacks(32, 50), 3, [("small_dense", "moe_2", ">= 0.75")]),
}  # fmt: skip


def main() -> None:
    """Time all tables; print the ratios and keep everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for title, (calls, repeats, ratios) in TABLES.items():
        seconds = timed(calls(), repeats)
        found[title] = {"seconds": seconds, "ratios": {}}
        for above, below, target in ratios:
            values = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            middle = median(seconds[above]) / median(seconds[below])
            found[title]["ratios"][f"{above} / {below}"] = {"value": middle, "spread": [values[0], values[-1]], "target": target}
            print(f"{title:22} {above} / {below}: {middle:.2f} ({values[0]:.2f} to {values[-1]:.2f}), target {target}", flush=True)
    machine = {"threads": arguments.threads, "torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu()}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine, "tables": found}, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
