"""A plain network as a graph, and which channels of its tensors belong together.

Shapes: B images, C channels. Along dimension 1 of a tensor lie strands, each the channels that one layer puts out. Tensors that
are added or multiplied have the same strands, a concatenation has those of its parts, and nothing else may mix channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Size, Tensor, fx, nn

from advmoe.errors import UserError
from advmoe.moe.kinds import scaled

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
KEEPERS = (  # layers whose output has the channels of their input, or these flattened
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Flatten,
)  # fmt: skip
KEEPING = {  # the same as functions and methods
    "relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid", "sigmoid_",
    "tanh", "tanh_", "hardtanh", "hardswish", "hardsigmoid", "neg", "clamp", "clamp_", "contiguous", "clone", "float",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "mean", "flatten", "view", "reshape",
    "squeeze", "unsqueeze",
}  # fmt: skip
JOINING = {
    "add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv",
    "maximum", "minimum",
}  # fmt: skip
VIEWS = {"view", "reshape"}
NOTHING = "something else than images and what became of them"
CONCATENATING = {"cat", "concat", "concatenate"}


@dataclass(eq=False)
class Strand:
    """`full` channels, of which a share stays; all of them stay where it is `whole`: the images', the logits', a single one."""

    full: int
    whole: bool

    def width(self, scale: float) -> int:
        """How many stay. Raises UserError where none does."""
        return self.full if self.whole else scaled(self.full, scale)


class Part(NamedTuple):
    """A strand's place in a tensor: `repeat` features for each channel, 1 or, after flattening, H * W."""

    strand: Strand
    repeat: int


Features = tuple[Part, ...]


def count(features: Features) -> int:
    """How many there are in the plain network."""
    return sum(part.strand.full * part.repeat for part in features)


def kept(features: Features, scale: float) -> Tensor:
    """Indices of those that stay, int64: the first ones of each strand."""
    rows, first = [], 0
    for strand, repeat in features:
        rows.append(torch.arange(first, first + strand.width(scale) * repeat))
        first += strand.full * repeat
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of a model with one input and one output [B, classes]; the features of each tensor that the images reach.

    `images` are the nodes that give the images themselves, before any convolution.
    """

    module: fx.GraphModule
    features: dict[fx.Node, Features]
    images: set[fx.Node]

    def layer(self, node: fx.Node) -> Any:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def layers(self, *kinds: type[nn.Module]) -> Iterator[tuple[fx.Node, Any]]:
        """Nodes that call a module of one of the `kinds`, with that module, in order."""
        for node in list(self.module.graph.nodes):
            if node.op == "call_module" and type(self.layer(node)) in kinds:
                yield node, self.layer(node)


def trace(model: nn.Module, example_input: Tensor) -> Traced:
    """Follow images like `example_input` [B, C, H, W] through `model`, which is left in eval mode.

    Raises UserError that names the layer where the model cannot be traced, or where its channels cannot be followed.
    """
    if example_input.ndim != 4 or len(example_input) == 0:
        raise UserError(f"example_input must be images [B, C, H, W], not {list(example_input.shape)}")
    module = fx.GraphModule(model, _graph(model))
    module.graph.eliminate_dead_code()
    walk = _Walk(module, _shapes(module, example_input))
    for node in module.graph.nodes:
        walk.enter(node)
    _flatten_by_name(walk)
    module.graph.eliminate_dead_code()  # the sizes that views asked for
    return Traced(module, walk.features, walk.images)


class _Tracer(fx.Tracer):
    """Takes convolutions, linear layers and norms of one's own as one layer each, so that they can be named."""

    failed = ""
    proxy_buffer_attributes = True  # as parameters are: what is made of them stays part of the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear, *NORMS)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)  # the innermost comes first
            raise


def _graph(model: nn.Module) -> fx.Graph:
    graphs = []
    for training in (True, False):
        tracer = _Tracer()
        try:
            graphs.append(tracer.trace(model.train(training)))
        except Exception as error:  # whatever the model's own code makes of a stand-in for a tensor
            raise UserError(f"{tracer.failed or type(model).__name__}: cannot be traced: {error}") from None
    if str(graphs[0]) != str(graphs[1]):
        raise UserError(f"{type(model).__name__}: does other things in train than in eval mode: use nn.Dropout, and one output")
    for node in graphs[1].find_nodes(op="placeholder")[1:]:
        if node.users:
            raise UserError(f"{type(model).__name__}: takes {node.target} beside the images")
        graphs[1].erase_node(node)
    return graphs[1]


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps the shape of each tensor, and none for several together."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.shapes[n] = Size()
        return value


@torch.no_grad()
def _shapes(module: fx.GraphModule, example_input: Tensor) -> dict[fx.Node, Size]:
    interpreter = _Shapes(module)
    try:
        interpreter.run(torch.cat([example_input[:1]] * 2))  # two: a batch of one is easily taken for something else
    except Exception as error:  # as above
        raise UserError(f"example_input {list(example_input.shape)} does not pass through the model: {error}") from None
    return interpreter.shapes


class _Walk:
    """Node by node, the features of what it gives."""

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, Size]) -> None:
        self.module, self.shapes = module, shapes
        self.features: dict[fx.Node, Features] = {}
        self.images: set[fx.Node] = set()
        self.called: set[str] = set()

    def enter(self, node: fx.Node) -> None:
        """Raises UserError where the features of `node` cannot be told."""
        sources = [source for source in node.all_input_nodes if source in self.features]
        if node.op == "placeholder":
            self.features[node] = (Part(Strand(self.shapes[node][1], True), 1),)
            self.images.add(node)
        elif node.op == "output":
            self._end(node)
        elif node.op == "call_module" and type(self.module.get_submodule(str(node.target))) in (nn.Conv2d, nn.Linear):
            self.features[node] = self._produced(node)
        elif node.op == "call_module" or (node in self.shapes and sources):
            self.features[node] = self._through_layer(node) if node.op == "call_module" else self._through_function(node)
            if self.images.issuperset(sources):
                self.images.add(node)

    def _end(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node) or len(self.shapes.get(logits, ())) != 2 or logits not in self.features:
            raise UserError(f"{_place(node)}: the model must give one tensor of logits [B, classes]")
        for part in self.features[logits]:
            part.strand.whole = True

    def _produced(self, node: fx.Node) -> Features:
        """New channels."""
        layer = self._once(node)
        if node.all_input_nodes[0] not in self.features:
            _refuse(node, f"reads {NOTHING}")
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            _refuse(node, f"has {layer.groups} groups, and only convolutions of one can be narrowed")
        if isinstance(layer, nn.Linear) and len(self.shapes[node]) != 2:
            _refuse(node, f"a linear layer on {len(self.shapes[node])} dimensions, where [B, features] can be followed")
        full = self.shapes[node][1]
        return (Part(Strand(full, full == 1), 1),)

    def _through_layer(self, node: fx.Node) -> Features:
        layer = self.module.get_submodule(str(node.target))
        if type(layer) in NORMS:
            self._once(node)
        elif type(layer) not in KEEPERS:
            _refuse(node, f"{type(layer).__name__} is no layer that can be followed")
        return self._keep(node)

    def _once(self, node: fx.Node) -> nn.Module:
        """The layer that a node calls, which must not have been called before."""
        if str(node.target) in self.called:
            _refuse(node, "is called more than once")
        self.called.add(str(node.target))
        return self.module.get_submodule(str(node.target))

    def _through_function(self, node: fx.Node) -> Features:
        name = _name(node)
        if name in KEEPING:
            return self._keep(node)
        if name in JOINING:
            return self._join(node)
        if name in CONCATENATING:
            return self._concatenate(node)
        _refuse(node, f"{name} is nothing that can be followed")

    def _keep(self, node: fx.Node) -> Features:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.features:
            _refuse(node, f"{_name(node)} of {NOTHING}")
        features, before, after = self.features[source], self.shapes[source], self.shapes[node]
        if _name(node) == "mean" and not _is_spatial(node, len(before)):
            _refuse(node, "mean over something else than height and width")
        if _name(node) in VIEWS and len(after) != 2 and _is_fixed(node):
            _refuse(node, f"{_name(node)} to a fixed number of channels: ask a tensor for it (x.shape[1])")
        if after[:2] == before[:2]:
            return features
        if after == (before[0], before[1:].numel()):
            return tuple(Part(strand, repeat * before[2:].numel()) for strand, repeat in features)
        _refuse(node, f"{_name(node)} makes {list(after)} of {list(before)}: channels cannot be followed")

    def _join(self, node: fx.Node) -> Features:
        operands = [operand for operand in node.all_input_nodes if operand in self.shapes]
        wide = [operand for operand in operands if operand in self.features]
        shape = self.shapes[node]
        for constant in (operand for operand in operands if operand not in self.features):
            if not all(part.strand.whole for part in self.features[wide[0]]) and not _is_even(self.shapes[constant], len(shape)):
                _refuse(constant, "has a value for each channel, and cannot be narrowed")
        if any(len(self.shapes[operand]) != len(shape) for operand in wide):
            _refuse(node, f"{_name(node)} of tensors with different dimensions")
        wide = [operand for operand in wide if self.shapes[operand][1] == shape[1]]  # one channel serves all of the other's
        if not wide:
            _refuse(node, f"{_name(node)} makes {shape[1]} channels out of one")
        for other in wide[1:]:
            self._unify(node, self.features[wide[0]], self.features[other])
        return self.features[wide[0]]

    def _unify(self, node: fx.Node, first: Features, second: Features) -> None:
        """Make one strand of each pair, wherever they occur."""
        sizes = [[(strand.full, repeat) for strand, repeat in features] for features in (first, second)]
        if sizes[0] != sizes[1]:
            shown = [" + ".join(str(full * repeat) for full, repeat in parts) for parts in sizes]
            _refuse(node, f"{_name(node)} of channels that were put together differently: {shown[0]}, and {shown[1]}")
        for (own, _), (other, _) in zip(first, second, strict=True):
            own.whole |= other.whole
            for at, features in self.features.items():
                self.features[at] = tuple(Part(own if strand is other else strand, repeat) for strand, repeat in features)

    def _concatenate(self, node: fx.Node) -> Features:
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim % len(self.shapes[node]) != 1:
            _refuse(node, f"{_name(node)} along dimension {dim}, where channels are 1")
        if not isinstance(parts, list | tuple) or any(part not in self.features for part in parts):
            _refuse(node, f"{_name(node)} of {NOTHING}")
        return tuple(part for tensor in parts for part in self.features[tensor])


def _flatten_by_name(walk: _Walk) -> None:
    """Flatten where a view does, whatever numbers it was given: they are those of the plain network."""
    for node in walk.features:
        if node.op != "placeholder" and _name(node) in VIEWS and len(walk.shapes[node]) == 2:
            node.op, node.target = "call_function", torch.flatten
            node.args, node.kwargs = (node.args[0], 1), {}


def _is_fixed(node: fx.Node) -> bool:
    """Whether a view names the number of channels instead of asking a tensor for it."""
    given: Any = (*node.args[1:], *node.kwargs.values())
    sizes = given[0] if isinstance(given[0], list | tuple) else given
    return len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] > 0


def _is_spatial(node: fx.Node, ndim: int) -> bool:
    """Whether a mean is over dimensions behind the channels alone."""
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return dims is not None and all(isinstance(dim, int) and dim % ndim >= 2 for dim in dims)


def _is_even(shape: Size, ndim: int) -> bool:
    """Whether a constant that is broadcast to `ndim` dimensions is the same for every channel."""
    return len(shape) < ndim - 1 or shape[len(shape) - ndim + 1] == 1


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return "it"
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _place(node: fx.Node) -> str:
    """The name of the layer that a node is or lies in."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return next(reversed(node.meta.get("nn_module_stack") or {"": None}), "") or "forward"


def _refuse(node: fx.Node, why: str) -> NoReturn:
    raise UserError(f"{_place(node)}: {why}")
