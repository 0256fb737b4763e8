"""Make the layers of a traced network narrower, and replace some of its convolutions by MoE layers."""

import math
from collections.abc import Sequence
from operator import getitem

import torch
from torch import Tensor, fx, nn

from advmoe.errors import UserError
from advmoe.moe.channels import Channels
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.convert.features import NORMS, count, kept
from advmoe.moe.convert.trace import Traced
from advmoe.moe.kinds import DenseKind
from advmoe.moe.norm import ExpertNorm


@torch.no_grad()
def narrowed(traced: Traced, kind: DenseKind, routed: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph with narrower layers, and with MoE layers for the nodes in `routed`.

    It maps (x, gate, logits of the network's router or None) to (logits, routings of all layers).
    """
    graph, norms = traced.module.graph, {node: _following_norm(traced, node) for node in routed}
    narrowable = (nn.Conv2d, nn.Linear, nn.PReLU, *NORMS)
    layers = [(node, layer, _Indices(traced, node, kind.scale)) for node, layer in traced.layers(*narrowable)]
    with graph.inserting_after(graph.find_nodes(op="placeholder")[0]):
        gate = graph.placeholder("gate")
    with graph.inserting_after(gate):
        router_logits = graph.placeholder("router_logits")
    calls: list[fx.Node] = []
    for node, layer, indices in layers:
        if node in norms:
            norm = norms[node]
            moe = _moe_layer(layer, None if norm is None else traced.layer(norm), indices, kind)
            moe.index = len(calls) if moe.router is not None else 0
            traced.module.add_submodule(str(node.target), moe)
            calls.append(_call_moe_layer(graph, node, (gate, router_logits), norm))
        elif node not in norms.values():
            _narrow(layer, indices)
    output = graph.output_node()
    output.args = ((output.args[0], calls),)
    return fx.GraphModule(traced.module, graph)


def _following_norm(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The batch norm that is the only reader of the output of `node`, if it has weights and statistics to copy; else None."""
    (user, *others) = node.users
    if others or user.op != "call_module" or type(norm := traced.layer(user)) is not nn.BatchNorm2d:
        return None
    return user if norm.affine and norm.track_running_stats else None


def _call_moe_layer(graph: fx.Graph, node: fx.Node, routing: tuple[fx.Node, fx.Node], norm: fx.Node | None) -> fx.Node:
    """Make `node` call its MoE layer, which includes the norm, with gate and router logits. Returns the node of its routings."""
    (source,) = node.all_input_nodes
    with graph.inserting_after(node):
        y = graph.call_function(getitem, (node, 0))
        routings = graph.call_function(getitem, (node, 1))
    (node if norm is None else norm).replace_all_uses_with(y, delete_user_cb=lambda user: user not in (y, routings))
    node.args, node.kwargs = (source, *routing), {}
    if norm is not None:
        graph.erase_node(norm)
    return routings


class _Indices:
    """The channels of a layer that are kept: `rows` of its output, `columns` of its input."""

    def __init__(self, traced: Traced, node: fx.Node, scale: float) -> None:
        (source,) = node.all_input_nodes
        try:
            self.rows, self.columns = (kept(traced.features[at], scale) for at in (node, source))
        except UserError as error:
            raise UserError(f"{node.target}: {error}") from None
        self.full = count(traced.features[node])


def _cut(layer: nn.Conv2d | nn.Linear, indices: _Indices) -> tuple[Tensor, Tensor | None]:
    """Weights and bias of the kept channels. If inputs are removed, the weights are scaled up, so that sums keep their size."""
    weight = layer.weight[indices.rows][:, indices.columns]
    gain = math.sqrt(layer.weight.shape[1] / weight.shape[1])
    return gain * weight, None if layer.bias is None else layer.bias[indices.rows]


def _moe_layer(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, indices: _Indices, kind: DenseKind) -> MoEConv2d:
    """The MoE layer. Each of its experts has the kept channels of `conv` and `norm`."""
    inputs, outputs = Channels(conv.in_channels, len(indices.columns)), Channels(indices.full, len(indices.rows))
    layer = kind.conv(inputs, outputs, conv.kernel_size[0], conv.stride[0], norm=norm is not None)
    assert isinstance(layer, MoEConv2d)
    layer.to(conv.weight)
    weight, bias = _cut(conv, indices)
    layer.filters.copy_(weight[torch.arange(len(layer.filters)) % layer.width])
    if norm is not None:
        _start_norm(layer.norm, norm, indices.rows, bias)
    elif bias is not None:
        layer.bias = nn.Parameter(bias.expand(layer.num_experts, -1).clone())
    return layer


def _start_norm(new: nn.Module | None, norm: nn.BatchNorm2d, rows: Tensor, bias: Tensor | None) -> None:
    """Copy the entries `rows` of `norm` to the MoE layer's norm. The bias of the convolution is subtracted from the mean."""
    assert isinstance(new, ExpertNorm | nn.BatchNorm2d)
    assert isinstance(new.running_mean, Tensor)
    assert isinstance(new.num_batches_tracked, Tensor)
    assert isinstance(norm.num_batches_tracked, Tensor)
    new.eps, new.momentum = norm.eps, norm.momentum
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(new, name).copy_(getattr(norm, name)[rows])
    new.num_batches_tracked.copy_(norm.num_batches_tracked)  # with momentum None, it is the weight of the statistics
    if bias is not None:
        new.running_mean.sub_(bias)


def _narrow(layer: nn.Conv2d | nn.Linear | nn.PReLU | nn.BatchNorm2d | nn.BatchNorm1d, indices: _Indices) -> None:
    """Remove the channels of a layer that are not kept, in place."""
    if isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:
            layer.num_parameters, layer.weight = len(indices.rows), nn.Parameter(layer.weight[indices.rows])
        return
    if isinstance(layer, NORMS):
        layer.num_features = len(indices.rows)
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if value.ndim == 1:
                rows = value[indices.rows]
                setattr(layer, name, nn.Parameter(rows) if isinstance(value, nn.Parameter) else rows)
        return
    weight, bias = _cut(layer, indices)
    layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    else:
        layer.out_features, layer.in_features = weight.shape
