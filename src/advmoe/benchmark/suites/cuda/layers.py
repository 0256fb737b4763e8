"""The MoE layers of ResNet-18 one by one, and summed over the network."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d

from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Figures, Part, graphed, guarded, milliseconds
from advmoe.benchmark.variants import Call, network, spec
from advmoe.moe import DISPATCHES, MoEConv2d, PlainConv2d
from advmoe.moe.experts import FilterBank

DENSE = ("dense", "small dense")


@dataclass(frozen=True)
class Shape:
    """The shape of an MoE layer and of its input; and the channels, in and out, of the layers of `DENSE` networks in its place."""

    channels: int
    size: int
    width: int
    kernel: int
    stride: int
    of_dense: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.channels} -> {self.width}, {self.kernel}x{self.kernel}/{self.stride}, {self.size}x{self.size}"


def layers(part: Part) -> Iterator[Row]:
    """The time of every dispatch, and of dense and small dense convolutions, for each layer shape; then the sum over all layers."""
    totals: dict[tuple[str, str], float] = {}
    names = (*DENSE, *part.dispatches)
    for shape, times in layer_shapes(part).items():
        for what in ("forward", "both ways", *(("forward, graph", "both ways, graph") if part.cuda else ())):
            for name in names if not what.endswith("graph") else (name for name in names if name != "split"):
                for row in guarded("layers", f"{shape}, x{times}, {what}", partial(layer_time, part, shape, name, what)):
                    yield row
                    totals[what, name] = totals.get((what, name), 0.0) + times * (math.nan if row.value is None else row.value)
    for (what, name), total in totals.items():
        if not math.isnan(total):  # if no shape failed
            yield Row(suite="cuda", case=f"layers, all, {what}", what=name, value=total, unit="ms")


def layer_shapes(part: Part) -> Counter[Shape]:
    """The shapes of the MoE layers of ResNet-18, with the number of layers of each shape."""
    model, *dense = (network(kind, "resnet18", part.scale, part.device) for kind in ("MoE", *DENSE))
    shapes: Counter[Shape] = Counter()

    def hook(of_dense: tuple[tuple[int, int], ...], layer: MoEConv2d, inputs: tuple[Any, ...], _: object) -> None:
        kernel = layer.filters.shape[-1]
        shapes[Shape(layer.in_channels, inputs[0].shape[-1], layer.width, kernel, layer.stride, of_dense)] += 1

    for name, layer in model.named_modules():
        if isinstance(layer, MoEConv2d):
            layer.register_forward_hook(partial(hook, tuple(_channels(other.get_submodule(name)) for other in dense)))
    with torch.no_grad():
        model(torch.rand(2, *spec(part.scale.side).shape).to(part.device))
    return shapes


def _channels(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, PlainConv2d)
    return layer.in_channels, layer.out_channels


def layer_time(part: Part, shape: Shape, name: str, what: str) -> Figures:
    """The time of one variant."""
    call = layer_call(part, shape, name, backward=what.startswith("both"))
    return {name: milliseconds(part, graphed(call) if what.endswith("graph") else call)}


def layer_call(part: Part, shape: Shape, name: str, backward: bool) -> Call:
    """A pass of the plain convolution of a `DENSE` network, or of a dispatch of two experts."""
    dtype, device, batch = torch.bfloat16 if part.cuda else torch.float32, part.device, part.scale.batch
    channels = dict(zip(DENSE, shape.of_dense, strict=True))
    inputs, filters = channels.get(name, (shape.channels, 2 * shape.width))
    images = (batch, inputs, shape.size, shape.size)
    x = torch.randn(images, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    bank = torch.randn(filters, inputs, shape.kernel, shape.kernel, device=device, dtype=dtype)
    bank = (bank / bank[0].numel() ** 0.5).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    experts = (torch.arange(batch) % 2).to(device)
    layer = FilterBank(bank, (0, shape.width), shape.width, shape.stride, None, name)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y = (
                DISPATCHES[name](x, layer, experts, None)
                if name in DISPATCHES
                else conv2d(x, bank, None, shape.stride, layer.padding)
            )
            if backward:
                torch.autograd.grad(y, (x, bank), y.detach())

    return run
