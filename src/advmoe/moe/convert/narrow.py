"""A traced network with narrower layers, and MoE layers for some of its convolutions."""

import math
from collections.abc import Sequence
from operator import getitem

import torch
from torch import Tensor, fx, nn

from advmoe.errors import UserError
from advmoe.moe.channels import Channels
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.convert.trace import NORMS, Traced, count, kept
from advmoe.moe.kinds import MoEKind
from advmoe.moe.norm import ExpertNorm


@torch.no_grad()
def narrowed(traced: Traced, kind: MoEKind, routed: Sequence[fx.Node]) -> fx.GraphModule:
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
