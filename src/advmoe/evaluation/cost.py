"""What a network costs: parameters, and GMACs (multiply-accumulates of one picture, in billions)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.attacks import frozen
from advmoe.models import Classifier
from advmoe.moe import HARD, MoEConv2d


@dataclass(frozen=True)
class Cost:
    """`ideal` counts chosen experts, routers and plain layers; `executed` is what torch really multiplied."""

    params: int
    gmacs_ideal: float
    gmacs_executed: float


def cost(model: Classifier, shape: tuple[int, int, int]) -> Cost:
    """The cost of one picture [C, H, W]."""
    return Cost(sum(p.numel() for p in model.parameters()), ideal_macs(model, shape) / 1e9, executed_macs(model, shape) / 1e9)


@torch.no_grad()
def ideal_macs(model: Classifier, shape: tuple[int, int, int]) -> int:
    """Closed form over the layers' output sizes: convolutions, linear layers, one expert per MoE layer, routers."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor | tuple[Tensor, object]) -> None:
        nonlocal total
        y = output[0] if isinstance(output, tuple) else output
        total += y[0].numel() * _macs_per_output(module)

    counted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | MoEConv2d)]
    handles = [module.register_forward_hook(count) for module in counted]
    try:
        with frozen(model):
            model.forward_routed(_picture(model, shape), HARD)
    finally:
        for handle in handles:
            handle.remove()
    return total


@torch.no_grad()
def executed_macs(model: Classifier, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of a forward pass of one picture, by torch's own counter."""
    with frozen(model), FlopCounterMode(display=False) as counter:
        model(_picture(model, shape))
    return int(counter.get_total_flops()) // 2


def _macs_per_output(module: nn.Module) -> int:
    filters = module.filters if isinstance(module, MoEConv2d) else module.weight
    assert isinstance(filters, Tensor)
    return filters[0].numel()


def _picture(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    return torch.zeros(1, *shape, device=next(model.parameters()).device)
