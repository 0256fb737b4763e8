"""Select the dispatch: the way to run each image through the filters of its chosen expert.

Shapes: B images, N experts, K filters per expert.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from advmoe.config.choices import Dispatch
from advmoe.errors import UserError
from advmoe.moe.dispatch.grouped import grouped
from advmoe.moe.dispatch.split import split
from advmoe.moe.dispatch.wide import wide
from advmoe.moe.experts import FilterBank
from advmoe.moe.guards import check_untransformed, in_transform

# limits in copied filter values; if the filters learn, their gradients are copied too
GROUPED_UP_TO, GROUPED_UP_TO_LEARNING = 200_000, 40_000
STATIC = ("wide", "grouped", "triton")  # their shapes do not depend on the route
UNTRANSFORMABLE = ("split", "triton")  # with a custom backward pass, or shapes that depend on the route


def _triton(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    from advmoe.moe.dispatch.triton_conv import routed_conv2d  # noqa: PLC0415 (triton is optional)

    return routed_conv2d(x, bank, experts, one_hot)


# name -> function (x [B, C, H, W], bank, experts [B] int64, one_hot [B, N] or None) -> y [B, K, H', W']
DISPATCHES: dict[str, Callable[[Tensor, FilterBank, Tensor, Tensor | None], Tensor]] = {
    "split": split, "wide": wide, "grouped": grouped, "triton": _triton,
}  # fmt: skip


def run_chosen(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None = None) -> Tensor:
    """Run each image through the filters of its expert, with `bank.dispatch`: [B, C, H, W] -> [B, K, H', W'].

    `experts` [B] int64. `one_hot` [B, N] is the one-hot form of `experts`. If it is given (the straight-through gate), it gets the
    gradient of sum_e one_hot_e conv_e(x).
    """
    name = fastest(x, bank) if bank.dispatch == "auto" else bank.dispatch
    if name in UNTRANSFORMABLE:
        check_untransformed(f"dispatch '{name}'", "model.set_dispatch('auto') or 'wide'")
    return DISPATCHES[name](x, bank, experts, one_hot)


def fastest(x: Tensor, bank: FilterBank) -> str:
    """The dispatch that `auto` uses for inputs [B, C, H, W]: a fixed rule from results/benchmarks/dispatch.json (2 cores).

    `grouped` is faster while few filter values are copied; `split` is faster for large layers. One image gets `split`: it is
    faster in forward passes, although `grouped` is faster in most gradients of attacks and routers. CUDA always uses `split`: it
    was not measured here (`advmoe benchmark --suite cuda` measures it). torch.compile, torch.export and transforms of torch.func
    get `wide`, which has static shapes.
    """
    if in_transform() or torch.compiler.is_compiling():
        return "wide"
    copied = len(x) * bank.width * (bank.filters.numel() // len(bank.filters))
    learns = torch.is_grad_enabled() and bank.filters.requires_grad
    small = len(x) > 1 and copied <= (GROUPED_UP_TO_LEARNING if learns else GROUPED_UP_TO)
    return "grouped" if small and x.device.type == "cpu" and x.is_contiguous() else "split"


def available(device: torch.device) -> list[Dispatch]:
    """The names of the dispatches that run on `device`, with `auto`."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_triton = importlib.util.find_spec("triton") is not None and (device.type == "cuda" or interpreted)
    return [name for name in get_args(Dispatch) if name != "triton" or has_triton]


def check_dispatch(name: str, device: torch.device) -> None:
    """Raises UserError if `device` cannot run dispatch `name`."""
    if name not in available(device):
        raise UserError(f"dispatch {name!r} does not run on {device.type} here; these do: {', '.join(available(device))}")
