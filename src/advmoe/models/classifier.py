"""What every network of the project is: pixels in, logits out, routes returned on request."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.moe import HARD, Gate, MoEConv2d, Routings


class Normalize(nn.Module):
    """(x - mean) / std per channel: the network's own first layer, so that epsilon is in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Base of the backbones: `forward` gives logits through the hard gate, `forward_routed` the routes beside them."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of pictures [B, C, H, W] with pixels in [0, 1]."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes] and one Routing for each MoE layer, in order."""
        raise NotImplementedError

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their routings; none in a dense network."""
        return [module for module in self.modules() if isinstance(module, MoEConv2d)]

    def router_parameters(self) -> list[nn.Parameter]:
        """The lower level's parameters p."""
        return [parameter for layer in self.moe_layers() for parameter in layer.router.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The upper level's parameters w: everything but the routers."""
        routers = {id(parameter) for parameter in self.router_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in routers]

    def number_layers(self) -> None:
        """Tell each MoE layer its place; a backbone calls this at the end of its constructor."""
        for index, layer in enumerate(self.moe_layers()):
            layer.index = index
