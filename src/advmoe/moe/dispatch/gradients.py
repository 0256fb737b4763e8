"""Gradients that `split` and `triton`, which have custom backward passes, compute in the same way.

Shapes: B images, N experts, K filters per expert.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from advmoe.moe.dispatch.wide import wide
from advmoe.moe.experts import FilterBank


def bias_gradient(sums: Tensor, bias: Tensor, experts: Tensor) -> Tensor:
    """The gradient [N, K] to `bias` [N, K]. `sums` [B, K] is the gradient to the outputs of `experts` [B], summed over pixels."""
    return torch.zeros_like(bias).index_add_(0, experts, sums.to(bias.dtype))


def one_hot_gradient(
    gradient: Tensor, of_chosen: Tensor, of_biases: Tensor | None, experts: Tensor, num_experts: int,
    convolve: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """<gradient, conv_e(x)> for every image and expert: [B, N], at least float32.

    `of_chosen` [B, 1] are the entries of the chosen experts, without bias. A convolution is linear in x, so such an entry is
    <the gradient to x, x>, and that gradient is known already. `of_biases` [B, N] are the `bias_products`, None without biases.
    `convolve` returns the outputs, without bias, of the experts [B] that it gets. It is called N - 1 times.
    """
    products = gradient.new_empty(len(experts), num_experts, dtype=of_chosen.dtype).scatter_(1, experts[:, None], of_chosen)
    for offset in range(1, num_experts):
        others = (experts + offset) % num_experts
        products.scatter_(1, others[:, None], inner(gradient, convolve(others)))
    return products if of_biases is None else products + of_biases


def bias_products(sums: Tensor, bias: Tensor) -> Tensor:
    """<gradient, `bias` of expert e> for every image and expert: [B, N], at least float32. `sums` as in `bias_gradient`."""
    dtype = torch.promote_types(sums.dtype, torch.float32)
    return sums.to(dtype) @ bias.to(dtype).T


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of a and b for each image, [B, 1], at least float32."""
    return (a * b).sum(dim=(1, 2, 3), dtype=torch.promote_types(a.dtype, torch.float32))[:, None]


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
