"""The multiplications of a training iteration of ResNet-18, and the time of each part of it. About 10 minutes.

The ratio of the multiplications of two methods is the ratio of times that they would have if nothing but convolutions took time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites.operators import profiled
from advmoe.benchmark.variants import METHOD, configuration

PASSES = 3
PARTS = {
    "convolution, forward": ("mkldnn_convolution",),
    "convolution, backward": ("convolution_backward",),
    "gather and scatter": ("index_select", "index_copy_"),
    "activation": ("clamp_min_", "threshold_backward"),
    "copies and conversions": ("copy_",),
}
SPANS = {
    "batch norm": ("_Normalised", "_NormalisedBackward", "native_batch_norm", "native_batch_norm_backward"),
}


def measure(setup: Setup) -> Iterator[Row]:
    """The billions of multiply-accumulates of an iteration for each image, their ratios, and the milliseconds of each part."""
    scale, device = setup.scale, setup.device
    configs = {name: configuration(name, scale) for name in METHOD}
    configs |= {f"{name} bf16": variants.bf16(configs[name]) for name in ("AdvMoE", "AT (S-Dense)")}
    case = f"iteration, ResNet-18, batch {scale.training_batch}"
    calls = {name: variants.iteration(config, scale.side, device) for name, config in configs.items()}
    counts = {name: [multiplications(calls[name]) / scale.training_batch / 1e9] for name in METHOD}
    ratios = [("AdvMoE", "AT (Dense)", None), ("AdvMoE", "AT (S-Dense)", None)]
    yield from compare("iteration", f"{case}, multiply-accumulates for an image", "GMACs", counts, ratios)
    for name, call in calls.items():
        times, operators = profiled(call, setup.rounds(PASSES), PARTS, SPANS, scale.warm_up)
        for part, seconds in times.items():
            yield Row(suite="iteration", case=f"{case}, {part}", what=name, value=seconds, unit="s")
        yield Row(suite="iteration", case=f"{case}, operators", what=name, value=operators, unit="count")


def multiplications(call: Callable[[], object]) -> int:
    """The multiply-accumulates of the convolutions in `call`, forward and for each gradient."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        call()
    return counter.multiplications


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode cannot count here: its formula is wrong for gradients of grouped convolutions."""

    multiplications = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            self.multiplications += result.numel() * args[1][0].numel()
        elif function is torch.ops.aten.convolution_backward.default:
            gradient, _, filters, *_, (to_input, to_filters, _) = args
            self.multiplications += (to_input + to_filters) * gradient.numel() * filters[0].numel()
        return result
