"""Dispatch by one wide convolution: all experts on all images. Its shapes are static: the host never waits for the route."""

from dataclasses import replace

import torch
from torch import Tensor

from advmoe.moe.experts import FilterBank, every_expert, mixture


def wide(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `run_chosen`, by one convolution of all experts on all images: N times the arithmetic, but the fewest calls."""
    if one_hot is not None:
        return mixture(x, bank, one_hot)
    parts = every_expert(x, bank).permute(0, 1, 3, 4, 2)  # no copy if the convolution wrote channels last
    return parts[torch.arange(len(x), device=x.device), experts].permute(0, 3, 1, 2)


def differentiable_gradients(
    gradient: Tensor, x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients to x, filters, bias and `one_hot` as differentiable functions, for second derivatives."""
    # views, so that a path from one input to another, such as through the router, is not counted
    inputs = [None if t is None else t.view_as(t) for t in (x, bank.filters, bank.bias, one_hot)]
    pixels, filters, bias = (None if t is None else t.to(gradient.dtype) for t in inputs[:3])
    assert pixels is not None
    assert filters is not None
    y = wide(pixels, replace(bank, filters=filters, bias=bias), experts, inputs[3])
    needed = [t for t in inputs if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad(y, needed, gradient, create_graph=True))
    return tuple(next(gradients) if t is not None and t.requires_grad else None for t in inputs)
