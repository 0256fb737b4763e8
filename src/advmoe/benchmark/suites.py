"""What is compared, how often, and what the ratios should be. Each suite but growth takes less than five minutes on two cores."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from advmoe.benchmark import variants
from advmoe.benchmark.growth import growth
from advmoe.benchmark.memory import measurable, probe
from advmoe.benchmark.rows import Found, Ratio, compared
from advmoe.benchmark.timing import Calls, timed
from advmoe.benchmark.variants import KINDS, METHOD, Scale, configuration

MEMORY_ROUNDS = 2


def inference(scale: Scale, device: torch.device) -> Iterator[Found]:
    """Forward passes: batches, single images, many experts, another backbone, bfloat16, torch.compile."""

    def calls(*kinds: str, backbone: str = "resnet18", batch: int = scale.batch) -> dict[str, partial[Tensor]]:
        return {kind: variants.inference(kind, scale, device, backbone, batch) for kind in kinds}

    def found(title: str, made: Calls, rounds: int, *ratios: Ratio) -> Found:
        return compared("inference", title, "seconds", timed(made, scale.rounds or rounds, device), ratios)

    batch = f"batch {scale.batch}"
    full = [("dense", "MoE", ">= 3.0"), ("MoE", "small dense", "<= 1.3"), ("16 experts", "MoE", "<= 1.4")]
    yield found(f"ResNet-18, {batch}", calls(*KINDS), 15, *full)
    single = [("dense", "MoE", ">= 1.8"), ("MoE", "small dense", None)]
    yield found("ResNet-18, batch 1", calls("dense", "small dense", "MoE", batch=1), 60, *single)
    yield found(f"WRN-28-10, {batch}", calls("dense", "MoE", backbone="wrn28_10"), 4, ("dense", "MoE", ">= 3.3"))
    both = calls("dense", "MoE")
    lower = {f"{kind} bf16": variants.in_bf16(call) for kind, call in both.items()}
    yield found(f"ResNet-18, {batch}, bf16", both | lower, 7, *((f"{kind} bf16", kind, None) for kind in both))
    if variants.compiler_found():
        quick = {f"{kind} compiled": variants.compiled(kind, scale, device) for kind in both}
        ratios = [("dense compiled", "MoE compiled", None), *((f"{kind} compiled", kind, None) for kind in both)]
        yield found(f"ResNet-18, {batch}, compiled", both | quick, 7, *ratios)


def training(scale: Scale, device: torch.device) -> Iterator[Found]:
    """Iterations: time, peak memory, bfloat16."""
    configs = {name: configuration(name, scale) for name in METHOD}
    title = f"iteration, ResNet-18, batch {scale.training_batch}"
    calls = {name: variants.iteration(config, scale.side, device) for name, config in configs.items()}
    seconds = timed(calls, scale.rounds or 4, device)
    targets = [("AdvMoE", "AT (Dense)", "<= 0.75"), ("AdvMoE", "AT (S-Dense)", "<= 2.9")]
    yield compared("training", title, "seconds", seconds, targets)
    both = {name: calls[name] for name in ("AdvMoE", "AT (Dense)")}
    lower = {f"{name} bf16": variants.iteration(variants.bf16(configs[name]), scale.side, device) for name in both}
    seconds = timed(both | lower, scale.rounds or 2, device)
    yield compared("training", f"{title}, bf16", "seconds", seconds, [(f"{name} bf16", name, None) for name in both])
    if measurable(device):
        held = {name: [float(probe(configs[name], scale.side, device).memory) for _ in range(MEMORY_ROUNDS)] for name in both}
        yield compared("training", f"peak memory, {title}", "bytes", held, [("AdvMoE", "AT (Dense)", "<= 0.75")])


def attack(scale: Scale, device: torch.device) -> Iterator[Found]:
    """Evaluation attacks through the hard gate, on the twins with batch norms folded in and on the network itself."""
    calls = {kind: variants.attack(kind, scale, device) for kind in ("MoE", "small dense")}
    calls["MoE unfolded"] = variants.attack("MoE", scale, device, folded=False)
    seconds = timed(calls, scale.rounds or 3, device)
    rates = {name: [scale.attack_batch / value for value in values] for name, values in seconds.items()}
    title = f"PGD-{scale.attack_steps} images a second, batch {scale.attack_batch}"
    ratios = [("MoE", "small dense", ">= 0.75"), ("MoE", "MoE unfolded", None)]
    yield compared("attack", title, "images_per_second", rates, ratios)


def data(scale: Scale, device: torch.device) -> Iterator[Found]:
    """Loading and augmentation of images in memory, as a share of the iteration that they are for."""
    config = configuration("AdvMoE", scale)
    calls = {
        "loading": variants.loading(config, scale, device),
        "AdvMoE iteration": variants.iteration(config, scale.side, device),
    }
    seconds = timed(calls, scale.rounds or 8, device)
    yield compared("data", f"batch {scale.training_batch}", "seconds", seconds, [("loading", "AdvMoE iteration", "<= 0.03")])


Suite = Callable[[Scale, torch.device], Iterable[Found]]
SUITES: dict[str, Suite] = {"inference": inference, "training": training, "attack": attack, "data": data, "growth": growth}
