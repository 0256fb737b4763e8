"""Dispatch by sorting: group the images by expert, convolve each group, and put the outputs back in the order of the batch.

Only chosen experts run, for any batch size. The host must know the number of images of each expert, so it waits for the route.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.moe.dispatch.gradients import bias_gradient, bias_products, differentiable_gradients, inner, one_hot_gradient
from advmoe.moe.dispatch.memory_format import empty_like, is_channels_last
from advmoe.moe.experts import FilterBank

Groups = list[tuple[int, Tensor]]  # the experts that have images, and the rows of these images
ALL_ROWS = torch.empty(0, dtype=torch.int64)  # the rows of a single group, which are never read
Convolve = Callable[..., Tensor]  # (images, expert, ...) -> that expert's outputs for them


def split(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `run_chosen`. Under the straight-through gate the other experts run only in the backward pass."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bank.filters, bank.bias, one_hot)):
        y: Tensor = _Split.apply(x, bank.filters, bank.bias, one_hot, experts, bank)  # type: ignore[no-untyped-call]
        return y
    return run_groups(x, groups_of(experts, len(bank.starts)), bank.convolve)


def groups_of(experts: Tensor, num_experts: int) -> Groups:
    """Group the images by their `experts` [B] int64, in ascending order of experts."""
    if len(experts) == 1:
        return [(int(experts), ALL_ROWS)]
    if experts.device.type == "cpu" and not torch.compiler.is_compiling():  # NumPy calls a tenth of the operators
        numbers = experts.numpy()
        counts, order = np.bincount(numbers, minlength=num_experts).tolist(), torch.from_numpy(numbers.argsort(kind="stable"))
    else:
        counts, order = torch.bincount(experts, minlength=num_experts).tolist(), experts.argsort(stable=True)
    if max(counts) == len(experts):  # also an empty batch, which keeps its shapes
        return [(counts.index(len(experts)), ALL_ROWS)]
    return [(e, rows) for e, rows in enumerate(order.split(counts)) if counts[e]]


def run_groups(x: Tensor, groups: Groups, convolve: Convolve, *others: Tensor) -> Tensor:
    """Each image through its expert, in the order of the batch: [B, C, H, W] -> [B, K, H', W'].

    `convolve` also gets the group's part of each of the `others` [B, ...].
    """
    if len(groups) == 1:
        return convolve(x, groups[0][0], *others)
    y: Tensor | None = None
    for e, rows in groups:
        part = convolve(_take(x, rows), e, *(_take(other, rows) for other in others))
        y = empty_like(part, (len(x), *part.shape[1:]), part.dtype) if y is None else y
        _put(y, rows, part)
    assert y is not None
    return y


class _Split(torch.autograd.Function):
    """Saves only x for the backward pass. Autograd over gather, convolution and scatter would save copies of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, bias: Tensor | None, one_hot: Tensor | None, experts: Tensor, bank: FilterBank
    ) -> Tensor:
        ctx.groups, ctx.bank = groups_of(experts, len(bank.starts)), replace(bank, filters=filters.detach(), bias=None)
        ctx.save_for_backward(x, filters, bias, one_hot, experts)
        return run_groups(x, ctx.groups, bank.convolve)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, bias, one_hot, experts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: second derivatives are wanted
            bank = replace(ctx.bank, filters=filters, bias=bias)
            return *differentiable_gradients(gradient, x, bank, experts, one_hot), None, None
        for_x, for_filters, for_bias, for_one_hot = ctx.needs_input_grad[:4]
        cast = [None if t is None else t.to(gradient.dtype) for t in (filters, bias)]  # under autocast they are still float32
        bank = replace(ctx.bank, filters=cast[0], bias=cast[1])
        to_x, to_filters = _gradients(gradient, x, bank, ctx.groups, (for_x or for_one_hot, for_filters))
        to_bias = bias_gradient(gradient.sum(dim=(2, 3)), bias, experts) if for_bias else None
        to_one_hot = None
        if for_one_hot:
            assert to_x is not None
            images, without_bias = x.to(gradient.dtype), replace(bank, bias=None)
            of_biases = None if bank.bias is None else bias_products(gradient.sum(dim=(2, 3)), bank.bias)
            to_one_hot = one_hot_gradient(
                gradient, inner(to_x, x), of_biases, experts, len(bank.starts),
                lambda others: split(images, without_bias, others, None),
            )  # fmt: skip
        to_filters = None if to_filters is None else to_filters.to(filters.dtype)
        return to_x if for_x else None, to_filters, to_bias, to_one_hot, None, None


def _gradients(
    gradient: Tensor, x: Tensor, bank: FilterBank, groups: Groups, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to x and to the filters; None for each that is not in `needed` (x, filters)."""
    single = len(groups) == 1
    to_x = empty_like(x, tuple(x.shape), x.dtype) if needed[0] and not single else None
    to_filters = torch.zeros_like(bank.filters) if needed[1] else None
    for e, rows in groups if any(needed) else ():
        dy, part = (gradient, x) if single else (_take(gradient, rows), _take(x, rows))
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, part.to(dy.dtype), bank.of_expert(e), None, [bank.stride] * 2, [bank.padding] * 2, [1, 1], False, [0, 0], 1,
            [*needed, False],
        )  # fmt: skip
        if single:
            to_x = dx.to(x.dtype) if needed[0] else None
        elif to_x is not None:
            _put(to_x, rows, dx.to(x.dtype))
        if to_filters is not None:
            _add_aligned(to_filters, bank.starts[e], bank.width, dw)
    return to_x, to_filters


def _add_aligned(filters: Tensor, start: int, width: int, window: Tensor) -> None:
    """Add `window`, the gradient of one expert's filters, to these filters of the bank. The inverse of `aligned`."""
    offset = start % width
    filters[start : start + width - offset] += window[offset:]
    filters[start + width - offset : start + width] += window[:offset]


# Read and write rows of a batch, in the memory format of the batch


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """The images x[rows], in the memory format of x."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _put(y: Tensor, rows: Tensor, part: Tensor) -> None:
    if is_channels_last(y):
        y.permute(0, 2, 3, 1).index_copy_(0, rows, part.permute(0, 2, 3, 1))
    else:
        y.index_copy_(0, rows, part)
