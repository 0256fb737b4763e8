"""Which dispatch is fastest on the CPU, by shape of the layer, batch and phase? About 10 minutes.

The rule of `auto` on the CPU follows from these rows. Its threshold comes from the AdvMoE iteration of the demo, in which the
processor's caches are cold. That iteration is timed last, with several thresholds (0: always split if the filters are fixed).
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import timed
from advmoe.moe.dispatch import choice, run_chosen
from advmoe.moe.experts import FilterBank
from advmoe.recipes import recipe

CPU = torch.device("cpu")
THRESHOLDS = (0, 100_000, 200_000, 400_000, 600_000)
NAMES = ("split", "wide", "grouped")
LAYERS = [(8, 4, 28), (16, 8, 14), (32, 16, 7), (64, 32, 32), (64, 64, 16), (128, 128, 8), (256, 256, 4)]  # C, K, height
BATCHES = (1, 2, 8, 32, 128)
EXPERTS = (2, 8)
PHASES = ("forward", "attack", "routers", "weights")  # tensors with a gradient: none, x, x and the route, x and the bank


def measure(setup: Setup) -> Iterator[Row]:
    """The seconds of each dispatch in each setting, then those of the demo's iteration by threshold."""
    settings = product(LAYERS[:1], BATCHES[:1], EXPERTS, PHASES) if setup.quick else product(LAYERS, BATCHES, EXPERTS, PHASES)
    for (inputs, width, size), batch, num_experts, phase in settings:
        x, bank = torch.randn(batch, inputs, size, size), torch.randn(num_experts * width, inputs, 3, 3)
        experts = torch.arange(batch) % num_experts
        starts = tuple(range(0, num_experts * width, width))
        calls = {name: layer_call(FilterBank(bank, starts, width, 1, None, name), x, experts, phase) for name in NAMES}
        case = f"{inputs} -> {width} channels, {size}x{size}, batch {batch}, N {num_experts}, {phase}"
        yield from compare("dispatch", case, "s", timed(calls, setup.rounds(7), CPU), ())
    seconds = timed(threshold_calls(), setup.rounds(14), CPU)
    yield from compare("dispatch", "demo's iteration by the filter values up to which auto groups", "s", seconds, ())


def layer_call(layer: FilterBank, x: Tensor, experts: Tensor, phase: str) -> Callable[[], object]:
    """One pass of a layer in the given phase."""
    x = x.clone().requires_grad_(phase != "forward")
    bank = layer.filters.clone().requires_grad_(phase == "weights")
    one_hot = torch.nn.functional.one_hot(experts, len(layer.starts)).float().requires_grad_() if phase == "routers" else None
    inputs = [t for t in (x, bank, one_hot) if t is not None and t.requires_grad]
    layer = FilterBank(bank, layer.starts, layer.width, layer.stride, None, layer.dispatch)

    def run() -> None:
        y = run_chosen(x, layer, experts, one_hot)
        if inputs:
            torch.autograd.grad(y, inputs, torch.ones_like(y))

    return run


def threshold_calls() -> dict[str, Callable[[], object]]:
    """The AdvMoE iteration of the demo, by the number of filter values up to which `auto` uses `grouped`."""
    step = variants.iteration(recipe("demo-advmoe"), 28, CPU)

    def under(limit: int) -> Callable[[], object]:
        def run() -> None:
            usual, choice.GROUPED_UP_TO = choice.GROUPED_UP_TO, limit
            try:
                step()
            finally:
                choice.GROUPED_UP_TO = usual

        return run

    return {str(limit): under(limit) for limit in THRESHOLDS}
