"""Find the channels of a traced network's tensors that must be narrowed together.

Shapes: B images, C channels. Dimension 1 of a tensor consists of channel groups; each group is the output of one layer. Tensors
that are added or multiplied have the same groups. A concatenation has the groups of its parts. No other operation may mix channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Size, Tensor, fx, nn

from advmoe.errors import UserError
from advmoe.moe.kinds import scaled

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
SOFTMAX = (nn.Softmax, nn.LogSoftmax)
KEEPING_LAYERS = (  # layers whose output has the channels of the input, possibly flattened
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink,
    nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Flatten,
)  # fmt: skip
KEEPING_FUNCTIONS = {  # functions and methods that do the same
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish", "softplus",
    "softsign", "sigmoid", "sigmoid_", "logsigmoid", "tanh", "tanh_", "tanhshrink", "hardtanh", "hardswish", "hardsigmoid",
    "hardshrink", "softshrink", "threshold", "neg", "abs", "exp", "log", "log1p", "sqrt", "rsqrt", "square", "erf",
    "contiguous", "clone", "float", "to", "type_as", "pad", "max_pool2d", "avg_pool2d", "lp_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample", "flatten", "view", "reshape", "squeeze", "unsqueeze",
    "expand", "expand_as", "getitem",
}  # fmt: skip
REDUCING = {"mean", "sum", "amax", "amin", "std", "var", "logsumexp", "norm"}  # allowed only over height and width
JOINING = {
    "add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv",
    "maximum", "minimum", "pow", "clamp", "clamp_", "clip",
}  # fmt: skip
SIZED = {"view", "reshape", "expand"}  # whose arguments may name the number of channels
VIEWS = {"view", "reshape"}
CONCATENATING = {"cat", "concat", "concatenate"}
OTHER = "something that is not computed from the images"


@dataclass(eq=False)
class ChannelGroup:
    """Channels that are narrowed together: `full` in the plain network. If `fixed` (images, logits, one channel), all are kept."""

    full: int
    fixed: bool

    def width(self, scale: float) -> int:
        """The number of channels that are kept. Raises UserError if it is 0."""
        return self.full if self.fixed else scaled(self.full, scale)


class Part(NamedTuple):
    """A channel group in a tensor, with `repeat` features for each channel: 1 or, after flattening, H * W."""

    group: ChannelGroup
    repeat: int


Features = tuple[Part, ...]


def count(features: Features) -> int:
    """The number of features in the plain network."""
    return sum(part.group.full * part.repeat for part in features)


def kept(features: Features, scale: float) -> Tensor:
    """Indices of the features that are kept, int64: the first ones of each group."""
    rows, first = [], 0
    for group, repeat in features:
        rows.append(torch.arange(first, first + group.width(scale) * repeat))
        first += group.full * repeat
    return torch.cat(rows)


class Walk:
    """Goes through the nodes of a graph in order and finds the features of each tensor.

    `features` has an entry for each tensor that depends on the images. `images` are the nodes before the first convolution.
    """

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, Size]) -> None:
        self.module, self.shapes = module, shapes
        self.features: dict[fx.Node, Features] = {}
        self.images: set[fx.Node] = set()
        self.called: set[str] = set()

    def enter(self, node: fx.Node) -> None:
        """Find the features of `node`. Raises UserError if that is not possible."""
        sources = [source for source in node.all_input_nodes if source in self.features]
        if node.op == "placeholder":
            self.features[node] = (Part(ChannelGroup(self.shapes[node][1], True), 1),)
            self.images.add(node)
        elif node.op == "output":
            self._end(node)
        elif node.op == "call_module" and type(self._layer(node)) in (nn.Conv2d, nn.Linear):
            self.features[node] = self._produced(node)
        elif node.op == "call_module" or (node in self.shapes and sources):
            self.features[node] = self._through_layer(node) if node.op == "call_module" else self._through_function(node)
            if self.images.issuperset(sources):
                self.images.add(node)

    def _layer(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _end(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node) or len(self.shapes.get(logits, ())) != 2 or logits not in self.features:
            raise UserError(f"{layer_name(node)}: the model must return one tensor of logits [B, classes]")
        self._fix(self.features[logits])

    def _fix(self, features: Features) -> None:
        for part in features:
            part.group.fixed = True

    def _produced(self, node: fx.Node) -> Features:
        """New channels."""
        layer = self._once(node)
        if node.all_input_nodes[0] not in self.features:
            _refuse(node, f"reads {OTHER}")
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            _refuse(node, f"has {layer.groups} groups; only convolutions with groups=1 can be narrowed")
        if isinstance(layer, nn.Linear) and len(self.shapes[node]) != 2:
            _refuse(node, f"a linear layer on {len(self.shapes[node])} dimensions; it must be on [B, features]")
        full = self.shapes[node][1]
        return (Part(ChannelGroup(full, full == 1), 1),)

    def _through_layer(self, node: fx.Node) -> Features:
        layer = self._layer(node)
        if isinstance(layer, SOFTMAX):
            return self._softmax(node, layer.dim)
        if type(layer) in NORMS or (isinstance(layer, nn.PReLU) and layer.num_parameters > 1):
            self._once(node)
        elif type(layer) not in (*KEEPING_LAYERS, nn.PReLU):
            _refuse(node, f"{type(layer).__name__} is not a layer that convert() can narrow")
        return self._keep(node)

    def _once(self, node: fx.Node) -> nn.Module:
        """The layer that a node calls. Raises UserError if it has been called before."""
        if str(node.target) in self.called:
            _refuse(node, "is called more than once; use a separate layer for each call")
        self.called.add(str(node.target))
        return self._layer(node)

    def _through_function(self, node: fx.Node) -> Features:
        name = name_of(node)
        if name in KEEPING_FUNCTIONS or name in REDUCING:
            return self._keep(node)
        if name in JOINING:
            return self._join(node)
        if name in CONCATENATING:
            return self._concatenate(node)
        if name in ("softmax", "log_softmax"):
            return self._softmax(node, _argument(node, "dim", 1))
        _refuse(node, f"{name}() is not an operation that convert() can follow")

    def _softmax(self, node: fx.Node, dim: Any) -> Features:
        """Softmax over the classes. Over channels that are narrowed it would compute something else."""
        features = self._keep(node)
        if not isinstance(dim, int) or dim % len(self.shapes[node]) != 1 or len(self.shapes[node]) != 2:
            _refuse(node, "softmax is supported only over dimension 1 of [B, classes]")
        self._fix(features)
        return features

    def _keep(self, node: fx.Node) -> Features:
        source = node.args[0] if node.args else node.kwargs.get("input")
        name = name_of(node)
        if not isinstance(source, fx.Node) or source not in self.features:
            _refuse(node, f"{name} of {OTHER}")
        features, before, after = self.features[source], self.shapes[source], self.shapes[node]
        if name in REDUCING and not _is_spatial(node, len(before)):
            _refuse(node, f"{name} over other dimensions than height and width")
        if name == "getitem" and not _keeps_channels(node.args[1]):
            _refuse(node, "takes a part of the images or channels by index; convert() follows only [:, :, ...]")
        if name in SIZED and len(after) != 2 and _is_fixed(node):
            _refuse(node, f"{name} to a fixed number of channels; ask a tensor for it: x.shape[1]")
        if after[:2] == before[:2]:
            return features
        if after == (before[0], before[1:].numel()):
            return tuple(Part(group, repeat * before[2:].numel()) for group, repeat in features)
        _refuse(node, f"{name} turns {list(before)} into {list(after)}: channels cannot be followed")

    def _join(self, node: fx.Node) -> Features:
        operands = [operand for operand in node.all_input_nodes if operand in self.shapes]
        wide = [operand for operand in operands if operand in self.features]
        shape = self.shapes[node]
        for constant in (operand for operand in operands if operand not in self.features):
            if not all(part.group.fixed for part in self.features[wide[0]]) and not _is_even(self.shapes[constant], len(shape)):
                _refuse(constant, "has a value for each channel, and cannot be narrowed")
        if any(len(self.shapes[operand]) != len(shape) for operand in wide):
            _refuse(node, f"{name_of(node)} of tensors with different dimensions")
        wide = [operand for operand in wide if self.shapes[operand][1] == shape[1]]  # a single channel is broadcast
        if not wide:
            _refuse(node, f"{name_of(node)} makes {shape[1]} channels out of one")
        for other in wide[1:]:
            self._unify(node, self.features[wide[0]], self.features[other])
        return self.features[wide[0]]

    def _unify(self, node: fx.Node, first: Features, second: Features) -> None:
        """Merge the groups of `first` and `second` pairwise, in all tensors."""
        sizes = [[(group.full, repeat) for group, repeat in features] for features in (first, second)]
        if sizes[0] != sizes[1]:
            sums = [" + ".join(str(full * repeat) for full, repeat in parts) for parts in sizes]
            _refuse(node, f"{name_of(node)} of channels that were concatenated differently: {sums[0]}, and {sums[1]}")
        pairs = [(part.group, other.group) for part, other in zip(first, second, strict=True)]
        while pairs:
            group, other = pairs.pop(0)
            group.fixed |= other.fixed
            pairs = [(group if a is other else a, group if b is other else b) for a, b in pairs]
            for at, features in self.features.items():
                self.features[at] = tuple(Part(group if each is other else each, repeat) for each, repeat in features)

    def _concatenate(self, node: fx.Node) -> Features:
        parts, dim = node.args[0] if node.args else node.kwargs["tensors"], _argument(node, "dim", 1, 0)
        if dim % len(self.shapes[node]) != 1:
            _refuse(node, f"{name_of(node)} along dimension {dim}; it must be 1, the channels")
        if not isinstance(parts, list | tuple) or any(part not in self.features for part in parts):
            _refuse(node, f"{name_of(node)} of {OTHER}")
        return tuple(part for tensor in parts if isinstance(tensor, fx.Node) for part in self.features[tensor])


def flatten_by_name(walk: Walk) -> None:
    """Replace views that flatten by `torch.flatten`, because the numbers in a view are those of the plain network."""
    for node in walk.features:
        if node.op != "placeholder" and name_of(node) in VIEWS and len(walk.shapes[node]) == 2:
            node.op, node.target = "call_function", torch.flatten
            node.args, node.kwargs = (node.args[0], 1), {}


def _argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_fixed(node: fx.Node) -> bool:
    """Whether the call gives the number of channels as a number instead of reading it from a tensor."""
    arguments: Any = (*node.args[1:], *node.kwargs.values())
    sizes = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else arguments
    return len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] > 0


def _is_spatial(node: fx.Node, ndim: int) -> bool:
    """Whether a reduction is only over dimensions after the channels."""
    dims = _argument(node, "dim", 2 if name_of(node) == "norm" else 1, node.kwargs.get("axis"))
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(dims, list | tuple) and all(isinstance(dim, int) and dim % ndim >= 2 for dim in dims)


def _keeps_channels(index: Any) -> bool:
    """Whether an index takes all images and all channels: [:, :, ...], possibly followed by None or slices."""
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    full_slice = slice(None, None, None)
    if parts and parts[0] is Ellipsis:
        return all(part is None for part in parts[1:])
    if len(parts) < 2 or parts[0] != full_slice:
        return False
    return bool(parts[1] == full_slice or (parts[1] is Ellipsis and len(parts) == 2))


def _is_even(shape: Size, ndim: int) -> bool:
    """Whether a constant that is broadcast to `ndim` dimensions is the same for every channel."""
    return len(shape) < ndim - 1 or shape[len(shape) - ndim + 1] == 1


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls; "it" for a layer."""
    if node.op == "call_module":
        return "it"
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def layer_name(node: fx.Node) -> str:
    """The name of the layer that a node calls, or of the layer whose code it is in."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return next(reversed(node.meta.get("nn_module_stack") or {"": None}), "") or "forward"


def _refuse(node: fx.Node, why: str) -> NoReturn:
    raise UserError(f"{layer_name(node)}: {why}")
