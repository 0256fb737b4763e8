"""Dispatch by one wide convolution: all experts on all images. Its shapes are static: the host never waits for the route."""

import torch
from torch import Tensor

from advmoe.moe.experts import FilterBank, every_expert, mixture


def wide(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `run_chosen`, by one convolution of all experts on all images: N times the arithmetic, but the fewest calls."""
    if one_hot is not None:
        return mixture(x, bank, one_hot)
    parts = every_expert(x, bank).permute(0, 1, 3, 4, 2)  # no copy if the convolution wrote channels last
    rows = torch.arange(x.shape[0], device=x.device)  # len(x) would fix the batch size of an exported network
    return parts[rows, experts].permute(0, 3, 1, 2)
