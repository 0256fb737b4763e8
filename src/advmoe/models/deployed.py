"""A copy of a network only for inference, with the fewest operators."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from advmoe.models.fused import fold_routers, fused
from advmoe.models.packed import PackedConv2d
from advmoe.models.resnet import BasicBlock
from advmoe.models.routed import RoutedConv2d, UnroutedConv2d, is_replaceable
from advmoe.moe import DenseConv2d, MoEConv2d, PlainConv2d, RoutedNetwork
from advmoe.moe.copies import copied
from advmoe.moe.replace import replace_modules

Network = TypeVar("Network", bound=RoutedNetwork)
FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {  # of convolutions, for inference
    MoEConv2d: RoutedConv2d, DenseConv2d: UnroutedConv2d, PlainConv2d: PackedConv2d, nn.Conv2d: PackedConv2d,
}  # fmt: skip


@torch.no_grad()
def deployed(model: Network) -> Network:
    """A copy in eval mode that computes the same logits and routes, up to rounding, as fast as possible.

    Use it to serve a network in PyTorch. Batch norms are folded into the convolutions and standardisation into the routers, and
    tensors are channels last. Each MoE layer is a `RoutedConv2d`, which runs the chosen experts (split dispatch). On the CPU, a
    convolution stores its filters in the library's layout (`PackedConv2d`); the first call converts them. In a ResNet's blocks, the
    ReLUs are part of the convolutions.

    All parameters are frozen. Only hard and forced gates work, and `moe_layers()` is empty. `fused` makes a copy whose routers can
    learn and that supports all gates.
    """
    copy = fused(copied(model))  # fused() shares the routers with its argument
    fold_routers(copy)
    replace_modules(copy, _for_inference)
    for module in copy.modules():
        # a subclass of BasicBlock may do something between a convolution and its activation
        if type(module) is BasicBlock and isinstance(module.activation, nn.ReLU):
            convolutions = module.conv1, module.conv2
            if all(isinstance(convolution, RoutedConv2d | UnroutedConv2d) for convolution in convolutions):
                for convolution in convolutions:
                    layers: Any = convolution.experts if isinstance(convolution, RoutedConv2d) else [convolution]
                    for layer in layers:
                        layer.relu = True
                module.activation = nn.Identity()
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copy.eval().requires_grad_(False)  # new modules are in train mode


def _for_inference(module: nn.Module) -> nn.Module:
    """A convolution's form for inference. Other modules are returned unchanged, such as a user's subclass of a convolution."""
    form = FORMS.get(type(module))
    return module if form is None or not is_replaceable(module) else form(module)
