"""A plain PyTorch CNN in its MoE form.

Shapes: B images, C channels, N experts, K channels an expert.
"""

import copy
from collections.abc import Collection

from torch import Tensor, fx, nn

from advmoe.errors import UserError, lookup
from advmoe.moe.conv import MoEConv2d, Routings
from advmoe.moe.convert.narrow import narrowed
from advmoe.moe.convert.trace import Traced, trace
from advmoe.moe.kinds import MoEKind
from advmoe.moe.network import RoutedNetwork
from advmoe.moe.routing import HARD, Gate


class Converted(RoutedNetwork):
    """What `convert` makes: the traced network with MoE layers, images [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced, self.router, self.masks = traced, None, nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], through the hard gate."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and the Routing of each MoE layer in the order of their calls."""
        logits, parts = self.traced(x, gate)
        return logits, tuple(routing for part in parts for routing in part)

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their calls, which need not be that of their definition."""
        return sorted(super().moe_layers(), key=lambda layer: layer.index)


def convert(
    model: nn.Module, num_experts: int = 2, model_scale: float = 0.5, *, example_input: Tensor, plain: Collection[str] = ()
) -> Converted:
    """`model`, a plain CNN (sequential, residual, concatenating), with an MoE layer for every convolution larger than 1x1.

    Every layer's width is `model_scale` times its own, but for logits and single channels. Convolutions that read the images or
    are named in `plain` are narrowed, not routed. Batch norms that follow an MoE layer become per-expert ones. Weights are the
    model's own, those of each layer's first channels, the same in all experts: at model scale 1 the logits are the model's. The
    model itself stays as it is. Images come to it unchanged: normalisation, if any, is the model's own.

    `example_input` [B, C, H, W]: images of the size to be classified. Raises UserError that names the layer that
    cannot be turned, and why.
    """
    kind = MoEKind(model_scale, num_experts)
    traced = trace(copy.deepcopy(model), example_input)
    names = {str(node.target): None for node, _ in traced.layers(nn.Conv2d)}
    for name in plain:
        lookup(names, name, "convolution")
    routed = [node for node, conv in traced.layers(nn.Conv2d) if node.target not in plain and _is_routed(traced, node, conv)]
    if not routed:
        raise UserError(f"{type(model).__name__}: nothing to route: no convolution larger than 1x1 behind the first")
    return Converted(narrowed(traced, kind, routed)).train(model.training)


def _is_routed(traced: Traced, node: fx.Node, conv: nn.Conv2d) -> bool:
    """Whether a convolution becomes an MoE layer. Raises UserError where it should and cannot."""
    (source,) = node.all_input_nodes
    if max(conv.kernel_size) == 1 or source in traced.images or traced.features[node][0].strand.whole:
        return False
    obstacle = _obstacle(conv)
    if obstacle:
        raise UserError(f"{node.target}: {obstacle} (plain=['{node.target}'] leaves it unrouted)")
    return True


def _obstacle(conv: nn.Conv2d) -> str:
    """Why a convolution has no MoE form; empty where it has."""
    kernel, half = conv.kernel_size, conv.kernel_size[0] // 2
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        return f"a kernel of {kernel[0]}x{kernel[1]}, where MoE layers have odd square ones"
    if conv.stride[0] != conv.stride[1]:
        return f"strides {conv.stride[0]} and {conv.stride[1]}, where MoE layers have the same for height and width"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation[0]}, where MoE layers have none"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode}, where MoE layers pad with zeros"
    if conv.padding not in ("same", (half, half)):
        return f"padding {conv.padding}, where an MoE layer of kernel {kernel[0]} has {half}"
    return ""
