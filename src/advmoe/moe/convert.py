"""A plain PyTorch CNN in its MoE form.

Shapes: B images, C channels, N experts, K channels an expert.
"""

import copy
import math
from collections.abc import Collection, Sequence
from operator import getitem

import torch
from torch import Tensor, fx, nn

from advmoe.errors import UserError, lookup
from advmoe.moe.channels import Channels
from advmoe.moe.conv import MoEConv2d, Routings
from advmoe.moe.kinds import MoEKind
from advmoe.moe.network import RoutedNetwork
from advmoe.moe.norm import ExpertNorm
from advmoe.moe.routing import HARD, Gate
from advmoe.moe.tracing import NORMS, Traced, count, kept, trace


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
    return Converted(_narrowed(traced, kind, routed)).train(model.training)


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


@torch.no_grad()
def _narrowed(traced: Traced, kind: MoEKind, routed: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph with narrow layers, MoE layers for those in `routed`: (x, gate) -> (logits, routings of each)."""
    graph, norms = traced.module.graph, {node: _following_norm(traced, node) for node in routed}
    layers = [(node, layer, _Places(traced, node, kind.scale)) for node, layer in traced.layers(nn.Conv2d, nn.Linear, *NORMS)]
    with graph.inserting_after(graph.find_nodes(op="placeholder")[0]):
        gate = graph.placeholder("gate")
    calls: list[fx.Node] = []
    for node, layer, places in layers:
        if node in norms:
            norm = norms[node]
            moe = _routed(layer, None if norm is None else traced.layer(norm), places, kind)
            moe.index = len(calls)
            traced.module.add_submodule(str(node.target), moe)
            calls.append(_called(graph, node, gate, norm))
        elif node not in norms.values():
            _narrow(layer, places)
    output = graph.output_node()
    output.args = ((output.args[0], calls),)
    return fx.GraphModule(traced.module, graph)


def _following_norm(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The batch norm that alone takes the output of `node`, if it has weights and statistics for the experts to start from."""
    (user, *others) = node.users
    if others or user.op != "call_module" or type(norm := traced.layer(user)) is not nn.BatchNorm2d:
        return None
    return user if norm.affine and norm.track_running_stats else None


def _called(graph: fx.Graph, node: fx.Node, gate: fx.Node, norm: fx.Node | None) -> fx.Node:
    """Let `node` call its MoE layer, which does the norm's work, too; give the node of its routings."""
    (source,) = node.all_input_nodes
    with graph.inserting_after(node):
        y = graph.call_function(getitem, (node, 0))
        routings = graph.call_function(getitem, (node, 1))
    (node if norm is None else norm).replace_all_uses_with(y, delete_user_cb=lambda user: user not in (y, routings))
    node.args, node.kwargs = (source, gate), {}
    if norm is not None:
        graph.erase_node(norm)
    return routings


class _Places:
    """Which channels of a layer stay: `rows` of its output, `columns` of its input."""

    def __init__(self, traced: Traced, node: fx.Node, scale: float) -> None:
        (source,) = node.all_input_nodes
        try:
            self.rows, self.columns = (kept(traced.features[at], scale) for at in (node, source))
        except UserError as error:
            raise UserError(f"{node.target}: {error}") from None
        self.full = count(traced.features[node])


def _cut(layer: nn.Conv2d | nn.Linear, places: _Places) -> tuple[Tensor, Tensor | None]:
    """Weights and bias of what stays. Weights grow as inputs get fewer, so that what they sum up to keeps its size."""
    weight = layer.weight[places.rows][:, places.columns]
    gain = math.sqrt(layer.weight.shape[1] / weight.shape[1])
    return gain * weight, None if layer.bias is None else layer.bias[places.rows]


def _routed(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, places: _Places, kind: MoEKind) -> MoEConv2d:
    """The MoE layer, all of whose experts are what stays of `conv` and `norm`."""
    inputs, outputs = Channels(conv.in_channels, len(places.columns)), Channels(places.full, len(places.rows))
    layer = kind.conv(inputs, outputs, conv.kernel_size[0], conv.stride[0], norm=norm is not None)
    assert isinstance(layer, MoEConv2d)
    layer.to(conv.weight)
    weight, bias = _cut(conv, places)
    layer.filters.copy_(weight[torch.arange(len(layer.filters)) % layer.width])
    if norm is not None:
        _start_norm(layer.norm, norm, places.rows, bias)
    elif bias is not None:
        layer.bias = nn.Parameter(bias.expand(layer.num_experts, -1).clone())
    return layer


def _start_norm(own: nn.Module | None, norm: nn.BatchNorm2d, rows: Tensor, bias: Tensor | None) -> None:
    """Each expert starts with the batch norm's entries `rows`; a bias that it would take away again is left out."""
    assert isinstance(own, ExpertNorm)
    own.eps, own.momentum = norm.eps, norm.momentum
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(own, name).copy_(getattr(norm, name)[rows])
    if bias is not None:
        own.running_mean.sub_(bias)


def _narrow(layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d, places: _Places) -> None:
    """Leave of a layer, in place, what stays."""
    if isinstance(layer, NORMS):
        layer.num_features = len(places.rows)
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if value.ndim == 1:
                setattr(layer, name, nn.Parameter(value[places.rows]) if isinstance(value, nn.Parameter) else value[places.rows])
        return
    weight, bias = _cut(layer, places)
    layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    else:
        layer.out_features, layer.in_features = weight.shape
