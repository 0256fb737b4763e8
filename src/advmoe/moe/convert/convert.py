"""Convert a plain PyTorch CNN to an MoE network.

Shapes: B images, C channels, N experts, K channels an expert.
"""

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from advmoe.errors import UserError, lookup, reason_of
from advmoe.moe.conv import MoEConv2d, Routings
from advmoe.moe.convert.narrow import narrowed
from advmoe.moe.convert.prepare import prepared, unwrapped
from advmoe.moe.convert.trace import Traced, trace
from advmoe.moe.kinds import DenseKind, MaskedKind, MoEKind
from advmoe.moe.network import RoutedNetwork
from advmoe.moe.replace import kept_modes
from advmoe.moe.routing import HARD, Gate

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}  # of logits at model scale 1, relative to the largest; other dtypes: 0.1
LARGE = 64  # height or width above which a network router has the ImageNet stem


class Converted(RoutedNetwork):
    """The result of `convert`: the traced network with MoE layers, images [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, traced: fx.GraphModule, router: nn.Module | None, input_size: torch.Size, num_classes: int) -> None:
        super().__init__()
        self.traced, self.router, self.masks = traced, router, nn.ModuleList()
        self.input_size, self.num_classes = input_size, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], through the hard gate."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and one Routing per MoE layer in call order, or a single one of the network's router.

        Raises UserError if the images have another size than in convert() and the network cannot take it.
        """
        self.check_mode()
        gate, router_logits, choice = self.choose(x, gate)
        try:
            logits, parts = self.traced(x, gate, router_logits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            weight = next(self.traced.parameters())
            if x.shape[1:] == self.input_size or (x.dtype, x.device) != (weight.dtype, weight.device):
                raise
            sizes = "x".join(map(str, self.input_size)), "x".join(map(str, x.shape[1:]))
            raise UserError(f"a network converted for images {sizes[0]} does not take {sizes[1]}: {reason_of(error)}") from error
        return logits, choice + tuple(routing for part in parts for routing in part)

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their calls, which may differ from the order of their definition."""
        return sorted(super().moe_layers(), key=lambda layer: layer.index)


def convert(
    model: nn.Module, num_experts: int = 2, model_scale: float = 0.5, *, example_input: Tensor, plain: Collection[str] = (),
    kind: DenseKind | None = None,
) -> Converted:  # fmt: skip
    """A copy of `model` in which convolutions larger than 1x1 are MoE layers. `model` itself does not change.

    `model` is a plain CNN: sequential, with residual connections, or with concatenations. It takes pixels in [0, 1]; if it needs
    normalised images, normalisation must be a layer of the model.

    Each layer has `model_scale` times the channels of the original, except logits and layers of one channel. Convolutions that
    read the images, or that are named in `plain`, become narrower but are not routed; those that write the logits or a single
    channel are not routed either. A batch norm that follows an MoE layer becomes part of it, with one norm for each expert. Each
    layer copies the weights of its first channels from the model, the same for all experts; where C inputs become C', they are
    multiplied by sqrt(C / C'). At model scale 1 the logits therefore equal those of the model; this is checked.

    `example_input` [B, C, H, W]: images of the size to classify. `kind`, as a backbone gets it, replaces `num_experts` and
    `model_scale`; with a DenseKind the layers become narrower, without MoE layers. Raises UserError, with the name of the layer or
    module and the reason, if the model cannot be converted.
    """
    kind = MoEKind(model_scale, num_experts) if kind is None else kind
    plain = (plain,) if isinstance(plain, str) else plain  # a string would be read letter by letter
    if isinstance(kind, MaskedKind):
        raise UserError("a converted network has no masks for at_sparse: write the backbone in the layers of advmoe")
    if isinstance(kind, MoEKind) and kind.routers == "per_stage":
        raise UserError("a converted network has no stages: routers must be per_layer or per_network")
    if example_input.ndim != 4 or len(example_input) == 0:
        raise UserError(f"example_input must be images [B, C, H, W], not {list(example_input.shape)}")
    network = prepared(model)
    with torch.random.fork_rng(devices=[]):  # the same seed gives the same routers with and without this check
        full = _converted(copy.deepcopy(network), replace(kind, scale=1.0), example_input, plain)
    _check_logits(unwrapped(model), full, example_input)
    return _converted(network, kind, example_input, plain).train(model.training)


def _converted(network: nn.Module, kind: DenseKind, example_input: Tensor, plain: Collection[str]) -> Converted:
    """The converted `network`, which is changed in place."""
    traced = trace(network, example_input)
    names = {str(node.target): None for node, _ in traced.layers(nn.Conv2d)}
    for name in plain:
        lookup(names, name, "convolution")
    routed: list[fx.Node] = []
    if isinstance(kind, MoEKind):
        routed = [node for node, conv in traced.layers(nn.Conv2d) if node.target not in plain and _is_routed(traced, node, conv)]
        if not routed:
            raise UserError(f"{type(network).__name__}: nothing to route: no convolution larger than 1x1 after the first")
    size = example_input.shape[1:]
    router = kind.network_router(size[0], "imagenet" if max(size[1:]) > LARGE else "cifar")
    graph = narrowed(traced, kind, routed)
    return Converted(graph, None if router is None else router.to(example_input), size, traced.num_classes)


@torch.no_grad()
def _check_logits(model: nn.Module, full: Converted, example_input: Tensor) -> None:
    """Raises UserError if the logits of `full`, at model scale 1, differ from those of `model`."""
    with kept_modes(model):
        expected = model.eval()(example_input.clone())
    if expected.is_meta:
        return
    logits = full.eval()(example_input.clone())
    off, size = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not off <= TOLERANCES.get(expected.dtype, 0.1) * max(size, 1e-3):
        raise UserError(
            f"{type(model).__name__}: its traced form differs from the model by {off:.2g} in logits of up to {size:.2g}; "
            "its forward() depends on something that tracing does not see"
        )


def _is_routed(traced: Traced, node: fx.Node, conv: nn.Conv2d) -> bool:
    """Whether a convolution becomes an MoE layer. Raises UserError if it should but cannot."""
    (source,) = node.all_input_nodes
    if max(conv.kernel_size) == 1 or source in traced.images or traced.features[node][0].group.fixed:
        return False
    obstacle = _obstacle(conv)
    if obstacle:
        raise UserError(f"{node.target}: {obstacle} (plain=['{node.target}'] leaves it unrouted)")
    return True


def _obstacle(conv: nn.Conv2d) -> str:
    """Why a convolution cannot become an MoE layer; empty if it can."""
    kernel, half = conv.kernel_size, conv.kernel_size[0] // 2
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        return f"a kernel of {kernel[0]}x{kernel[1]}, where MoE layers have square kernels of odd size"
    if conv.stride[0] != conv.stride[1]:
        return f"strides {conv.stride[0]} and {conv.stride[1]}, where MoE layers have the same for height and width"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation[0]}, where MoE layers have none"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode}, where MoE layers pad with zeros"
    if conv.padding not in ("same", (half, half)):
        return f"padding {conv.padding}, where an MoE layer of kernel {kernel[0]} has {half}"
    return ""
