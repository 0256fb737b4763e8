"""The blocks of a ResNet for inference. Between convolutions, images stay sorted by expert.

Shapes: B images, C channels, N experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.models.packed import PackedConv2d
from advmoe.models.resnet import BasicBlock
from advmoe.models.routed import RoutedConv2d, UnroutedConv2d
from advmoe.moe import Gate, Routing, Routings
from advmoe.moe.dispatch.split import sorted_by_expert, take_images

Layer = RoutedConv2d | UnroutedConv2d
Order = np.ndarray[Any, np.dtype[np.int64]]  # the index in the batch of the image at each position


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The feature maps [B, C, H, W] of a batch with its images in some `order`; None is the order of the batch."""

    values: Tensor
    order: Order | None = None

    def reordered(self, order: Order | None) -> Tensor:
        """The maps in another order of the images. Nothing is copied if the order is the same."""
        if order is self.order or (order is not None and self.order is not None and (order == self.order).all()):
            return self.values
        rows = np.arange(len(self.values)) if order is None else order
        if self.order is not None:
            rows = _positions(self.order)[rows]
        return take_images(self.values, torch.from_numpy(rows).to(self.values.device))

    def in_batch_order(self, values: Tensor) -> Tensor:
        """`values` [B, ...] of the images in this order, in the order of the batch."""
        return values if self.order is None else values.index_select(0, torch.from_numpy(_positions(self.order)).to(values.device))


@dataclass(frozen=True, eq=False)
class Grouping:
    """An order that sorts images by expert, and the experts that have images, each with its number of images."""

    order: Order | None
    sizes: dict[int, int]


class SortedBlocks(nn.Module):
    """The basic blocks of a ResNet in sequence.

    Images are moved only where the next convolution groups them differently: once between the two convolutions of a block,
    and once for each of the two branches at its start. A convolution adds to the shortcut and applies the ReLU while it
    writes (`PackedConv2d`).
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C', H', W'], and the routings of the blocks' routers. It may overwrite the memory of x."""
        maps, routings = FeatureMaps(x), cast(Routings, ())
        for block in self.blocks:
            maps, of_block = _block(cast(BasicBlock, block), maps, gate, logits)
            routings += of_block
        return maps.reordered(None), routings


def _block(block: BasicBlock, maps: FeatureMaps, gate: Gate, logits: Tensor | None) -> tuple[FeatureMaps, Routings]:
    """One block, `BasicBlock.forward`."""
    relu = isinstance(block.activation, nn.ReLU)
    activation = nn.Identity() if relu else block.activation
    first, second = cast(Layer, block.conv1), cast(Layer, block.conv2)
    grouping, routings = _route(first, maps, gate, logits)
    h = FeatureMaps(activation(_convolve(first, maps.reordered(grouping.order), grouping, relu, None)), grouping.order)
    grouping, of_second = _route(second, h, gate, logits)
    shortcut = maps if block.shortcut is None else FeatureMaps(block.shortcut(maps.values), maps.order)
    y = _convolve(second, h.reordered(grouping.order), grouping, relu, shortcut.reordered(grouping.order))
    return FeatureMaps(activation(y), grouping.order), routings + of_second


def _route(layer: Layer, maps: FeatureMaps, gate: Gate, logits: Tensor | None) -> tuple[Grouping, Routings]:
    """How a layer groups the images, and its Routing if it has a router. `logits` are those of the network's router."""
    size = len(maps.values)
    if isinstance(layer, UnroutedConv2d):
        return Grouping(maps.order, {0: size}), ()
    if layer.router is not None:
        logits = maps.in_batch_order(layer.router(maps.values))
    assert logits is not None
    experts = layer.choose(logits, gate)
    routings = () if layer.router is None else (Routing(logits, experts),)
    if size == 1:
        return Grouping(None, {int(experts): 1}), routings
    counts, order = sorted_by_expert(experts, len(layer.experts))
    if max(counts) == size:  # one expert for all images: any order will do
        return Grouping(maps.order, {counts.index(size): size}), routings
    return Grouping(order.cpu().numpy(), {e: count for e, count in enumerate(counts) if count}), routings


def _convolve(layer: Layer, x: Tensor, grouping: Grouping, relu: bool, onto: Tensor | None) -> Tensor:
    """Each expert on its consecutive images, plus `onto` if given, which may be overwritten."""
    y: Tensor
    if len(grouping.sizes) == 1:
        y = layer.experts[next(iter(grouping.sizes))](x, relu, onto)
        return y
    sizes = list(grouping.sizes.values())
    if torch.is_grad_enabled() and x.requires_grad:  # autograd refuses to write into parts of a tensor
        y = torch.cat([layer.experts[e](part) for e, part in zip(grouping.sizes, x.split(sizes), strict=True)])
        y = y if onto is None else y.add_(onto)
        return y.relu_() if relu else y
    if onto is None:  # a convolution writes into a tensor only by adding to it
        shape = (len(x), *cast(PackedConv2d, layer.experts[0]).output_shape(x))
        onto = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    for e, part, target in zip(grouping.sizes, x.split(sizes), onto.split(sizes), strict=True):
        layer.experts[e](part, relu, target)
    return onto


def _positions(order: Order) -> Order:
    """The inverse of an order: the position of each image of the batch."""
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions
