"""A copy of a network only for inference, with the fewest operators."""

from typing import TypeVar

import torch
from torch import nn

from advmoe.models.fused import fold_routers, fused
from advmoe.models.packed import PackedConv2d
from advmoe.models.resnet import ResNet
from advmoe.models.routed import RoutedConv2d, UnroutedConv2d
from advmoe.models.sorted_blocks import SortedBlocks
from advmoe.moe import DenseConv2d, MoEConv2d, PlainConv2d, RoutedNetwork

Network = TypeVar("Network", bound=RoutedNetwork)


@torch.no_grad()
def deployed(model: Network) -> Network:
    """A copy in eval mode that computes the same logits and routes, up to rounding, as fast as possible.

    Batch norms are folded into the convolutions and standardisation into the routers, all parameters are frozen, and tensors are
    channels last. Each MoE layer is a `RoutedConv2d`: it runs the chosen experts (split dispatch), supports only hard and forced
    gates, and is not in `moe_layers()`. On the CPU, filters are stored in the library's layout (`PackedConv2d`). The images of a
    ResNet stay sorted by expert from one convolution to the next (`SortedBlocks`). Use `fused` for a copy whose routers learn or
    that supports other gates.
    """
    copy = fused(model)
    fold_routers(copy)
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoEConv2d):
                setattr(parent, name, RoutedConv2d(child))
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DenseConv2d):
                setattr(parent, name, UnroutedConv2d(child))
            elif type(child) is nn.Conv2d or isinstance(child, PlainConv2d):
                setattr(parent, name, PackedConv2d(child))
    if isinstance(copy, ResNet):
        copy.blocks = nn.ModuleList([SortedBlocks(copy.blocks)])
    return copy.requires_grad_(False)
