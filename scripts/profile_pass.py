"""Where an inference pass of ResNet-18 spends its time: operators of the small dense network, of the MoE, and of the MoE with all
images sent to one expert (which has nothing to gather or scatter). torch.profiler, milliseconds a pass.

    python scripts/profile_pass.py --threads 2 --out benchmarks/results/profile.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from advmoe.benchmark import Scale, variants
from advmoe.benchmark.rows import machine
from advmoe.files import write_json
from advmoe.moe import Gate

PASSES = 10
PARTS = {
    "convolution": ("mkldnn_convolution",),
    "gather": ("index_select",),
    "scatter": ("index_copy_",),
    "activation and addition": ("clamp_min_", "add_"),
    "pooling and routers": ("sum", "addmm", "mean", "div_", "argmax", "sub", "rsqrt", "mul"),
}


@torch.inference_mode()
def to_one_expert(call: partial[torch.Tensor]) -> None:
    """The pass of `call`, all images routed to expert 0."""
    forward_routed, x, (_, layers) = call.args
    forward_routed(x, Gate("forced", route=torch.zeros(len(x), layers, dtype=torch.int64)))


def spent(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each part in one pass."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PASSES):
            call()
    own = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1000 / PASSES for event in found.key_averages()}
    parts = {part: sum(own.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    return parts | {"other": sum(own.values()) - sum(parts.values()), "all": sum(own.values())}


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    place, scale = torch.device("cpu"), Scale()
    calls = {kind: variants.inference(kind, scale, place, "resnet18", scale.batch) for kind in ("small dense", "MoE")}
    found = {kind: spent(call) for kind, call in calls.items()}
    found["MoE, one expert"] = spent(partial(to_one_expert, calls["MoE"]))
    print(f"{'ms a pass, batch 64':26}", *(f"{kind:>16}" for kind in found))
    for part in found["MoE"]:
        print(f"{part:26}", *(f"{parts[part]:16.2f}" for parts in found.values()))
    if arguments.out is not None:
        write_json(arguments.out, {"machine": machine(), "milliseconds": found})


if __name__ == "__main__":
    main()
