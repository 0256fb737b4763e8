"""Dispatch by Triton kernels of this package. Only the chosen experts are computed, and the shapes are static.

Importing this module needs Triton. It runs on CUDA, and on the CPU in Triton's interpreter (set TRITON_INTERPRET=1 before the
first import). The host never waits for the device. The first call for a device and layer copies a small table to the device and
compiles the kernels, so run the network once before you capture a CUDA graph.

Shapes: B images, N experts, K filters per expert, M filters in the bank.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from advmoe.errors import UserError
from advmoe.moe.dispatch import triton_kernels as kernels
from advmoe.moe.dispatch.gradients import bias_gradient, bias_products, differentiable_gradients, inner, one_hot_gradient
from advmoe.moe.dispatch.memory_format import empty_like
from advmoe.moe.experts import FilterBank

PROGRAMS = 512  # enough for a large GPU: a few for each multiprocessor


def routed_conv2d(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """Run each image through the filters of its expert: [B, C, H, W] -> [B, K, H', W'], in the memory format of x.

    `experts` [B] int64. Differentiable in x, filters, bias and `one_hot` [B, N], which gets the gradient of
    sum_e one_hot_e conv_e(x). 16-bit inputs are summed in float32. float32 inputs use TF32 if cuDNN may use it. Raises UserError
    on bfloat16 in Triton's interpreter.
    """
    if len(x) == 0:
        return bank.convolve(x, 0)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y: Tensor = _Routed.apply(x, bank.filters, bank.bias, one_hot, experts, bank)  # type: ignore[no-untyped-call]
    return y


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, bias: Tensor | None, one_hot: Tensor | None, experts: Tensor, bank: FilterBank
    ) -> Tensor:
        dtype = _precision(x)
        inputs, cast = x.to(dtype), filters.to(dtype, memory_format=torch.channels_last)
        ctx.layer = layer = _layer(inputs, cast, bank)
        ctx.bank = replace(bank, filters=filters.detach(), bias=None)
        ctx.save_for_backward(inputs, cast, bias, experts, x, filters, one_hot)
        return layer.convolve(inputs, cast, bias, layer.plan(experts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, cast, bias, experts, x, filters, one_hot = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: second derivatives are wanted
            bank = replace(ctx.bank, filters=filters, bias=bias)
            return *differentiable_gradients(gradient, x, bank, experts, one_hot), None, None
        for_x, for_filters, for_bias, for_one_hot = ctx.needs_input_grad[:4]
        layer = ctx.layer
        gradient, plan = gradient.to(inputs.dtype), layer.plan(experts)
        to_x = layer.to_images(gradient, cast, inputs, x.dtype, plan) if for_x or for_one_hot else None
        to_filters = layer.to_filters(gradient, inputs, len(cast), plan).to(filters.dtype) if for_filters else None
        to_bias = bias_gradient(_sums(gradient), bias, experts) if for_bias else None
        to_one_hot = None
        if for_one_hot:
            assert to_x is not None
            of_biases = None if bias is None else bias_products(_sums(gradient), bias)
            to_one_hot = one_hot_gradient(
                gradient, inner(to_x, inputs), of_biases, experts, layer.num_experts,
                lambda others: layer.convolve(inputs, cast, None, layer.plan(others)),
            )  # fmt: skip
        return to_x if for_x else None, to_filters, to_bias, to_one_hot, None, None


@dataclass(frozen=True, eq=False)
class _Plan:
    """The images sorted into tiles, each for one expert: owners [T], bounds [N + 1], slots [T, P] (see triton_kernels.plan)."""

    owners: Tensor
    bounds: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class _Layer:
    """The sizes of one layer for one batch, and how the work is divided: tiles of `images` x `pixels`, blocks of channels."""

    batch: int
    size: tuple[int, int, int, int, int, int]  # C, K, H, W, H', W'
    window: dict[str, int]
    num_experts: int
    rows: Tensor
    images: int
    pixels: int
    blocks: dict[str, int]
    numbers: dict[str, Any]

    @property
    def tiles(self) -> int:
        """The largest number of tiles that any routing needs."""
        used = min(self.num_experts, self.batch)
        return (self.batch - used) // self.images + used

    @property
    def common(self) -> dict[str, Any]:
        return self.window | self.blocks | self.numbers | {"P": self.images, "Q": self.pixels}

    def plan(self, experts: Tensor) -> _Plan:
        sizes = [self.tiles, self.num_experts + 1, self.tiles * self.images]
        owners, bounds, slots = torch.full((sum(sizes),), -1, dtype=torch.int32, device=experts.device).split(sizes)
        block = triton.next_power_of_2(self.batch)
        kernels.plan[(1,)](experts, owners, bounds, slots, self.batch, N=self.num_experts, P=self.images, BLOCK=block)
        return _Plan(owners, bounds, slots)

    def convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        _, width, _, _, out_h, out_w = self.size
        y = empty_like(x, (self.batch, width, out_h, out_w), x.dtype)
        grid = (self.tiles, triton.cdiv(out_h * out_w, self.pixels), triton.cdiv(width, self.blocks["BLOCK_K"]))
        kernels.convolve[grid](
            x, filters, x if bias is None else bias.contiguous(), y, self.rows, plan.owners, plan.slots, *self.size,
            *x.stride(), *filters.stride(), *y.stride(), **self.common, BIAS=bias is not None,
        )  # fmt: skip
        return y

    def to_images(self, gradient: Tensor, filters: Tensor, x: Tensor, dtype: torch.dtype, plan: _Plan) -> Tensor:
        channels, _, height, width, _, _ = self.size
        dx, stride = empty_like(x, tuple(x.shape), dtype), self.window["STRIDE"]
        cells = triton.cdiv(height, stride) * triton.cdiv(width, stride)
        blocks = triton.cdiv(cells, self.pixels) * stride**2
        kernels.to_images[(self.tiles, blocks, triton.cdiv(channels, self.blocks["BLOCK_C"]))](
            gradient, filters, dx, self.rows, plan.owners, plan.slots, *self.size,
            *gradient.stride(), *filters.stride(), *dx.stride(), **self.common,
        )  # fmt: skip
        return dx

    def to_filters(self, gradient: Tensor, x: Tensor, bank_size: int, plan: _Plan) -> Tensor:
        channels, width, kernel = *self.size[:2], self.window["KERNEL"]
        blocks = triton.cdiv(width, self.blocks["BLOCK_K"]) * triton.cdiv(channels, self.blocks["BLOCK_C"])
        chunks = self.tiles * triton.cdiv(self.size[4] * self.size[5], self.pixels)
        splits = min(chunks, max(1, PROGRAMS // (self.num_experts * kernel**2 * blocks)))
        shape = (splits, self.num_experts * width, kernel, kernel, channels)
        parts = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        kernels.to_filters[(splits * self.num_experts, kernel**2, blocks)](
            gradient, x, parts, plan.bounds, plan.slots, *self.size, *gradient.stride(), *x.stride(),
            **self.common, N=self.num_experts, SPLITS=splits,
        )  # fmt: skip
        total = parts.new_zeros(bank_size, *shape[2:]).index_add_(0, self.rows.flatten(), parts.sum(dim=0))
        return total.permute(0, 3, 1, 2)


def _layer(x: Tensor, filters: Tensor, bank: FilterBank) -> _Layer:
    batch, channels, height, width = x.shape
    kernel, padding = filters.shape[-1], bank.padding
    out_h, out_w = ((side + 2 * padding - kernel) // bank.stride + 1 for side in (height, width))
    blocks = {"BLOCK_K": _block(bank.width, x.dtype), "BLOCK_C": _block(channels, x.dtype)}
    columns = triton.cdiv(bank.width, blocks["BLOCK_K"])
    # a small layer is faster with more programs than with larger ones
    tile = 128 if batch * out_h * out_w * columns >= 128 * PROGRAMS else 64
    pixels = min(tile, triton.next_power_of_2(out_h * out_w))
    # not cudnn.allow_tf32, which raises an error once the precision is set here
    allowed = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    numbers = {"SUM": tl.float64 if x.dtype == torch.float64 else tl.float32, "PRECISION": "tf32" if allowed else "ieee"}
    window = {"KERNEL": kernel, "STRIDE": bank.stride, "PADDING": padding}
    size = (channels, bank.width, height, width, out_h, out_w)
    rows = _rows(bank.starts, bank.width, x.device)
    return _Layer(batch, size, window, len(bank.starts), rows, tile // pixels, pixels, blocks, numbers)


def _block(channels: int, dtype: torch.dtype) -> int:
    """A block size: a power of two that tensor cores support and that fits in shared memory."""
    return max(16, min(64 if dtype.itemsize == 2 else 32, int(triton.next_power_of_2(channels))))


@lru_cache(maxsize=4096)
def _rows(starts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[N, K] int32: for each channel of each expert, its filter in the bank. Cached to avoid a copy to the device."""
    with torch.inference_mode(False):
        first, channel = torch.tensor(starts)[:, None], torch.arange(width)
        return (first + (channel - first) % width).to(torch.int32).to(device)


def _precision(x: Tensor) -> torch.dtype:
    """The dtype in which torch's convolution would compute. Raises UserError on bfloat16 on the CPU."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
    if kind == "cpu" and dtype == torch.bfloat16:
        raise UserError("dispatch 'triton' on the CPU runs in Triton's interpreter, which has no bfloat16; it has float32")
    return dtype


def _sums(gradient: Tensor) -> Tensor:
    """[B, K, H', W'] -> [B, K], at least float32: in float16 a sum over many pixels could overflow."""
    return gradient.sum(dim=(2, 3), dtype=torch.promote_types(gradient.dtype, torch.float32))
