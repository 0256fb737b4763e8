"""Trace a plain network: a graph of its layers, with the channels of each tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, fx, nn

from advmoe.errors import UserError, reason_of
from advmoe.moe.convert.features import NORMS, Features, Walk, count, flatten_by_name
from advmoe.moe.copies import copied


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of a model with one input and one output [B, classes], and the features of each tensor that depends on the images.

    `images` are the nodes before the first convolution.
    """

    module: fx.GraphModule
    features: dict[fx.Node, Features]
    images: set[fx.Node]
    num_classes: int

    def layer(self, node: fx.Node) -> Any:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def layers(self, *kinds: type[nn.Module]) -> Iterator[tuple[fx.Node, Any]]:
        """Nodes that call a module of one of the `kinds`, with that module, in order."""
        for node in list(self.module.graph.nodes):
            if node.op == "call_module" and type(self.layer(node)) in kinds:
                yield node, self.layer(node)


def trace(model: nn.Module, example_input: Tensor) -> Traced:
    """Trace `model` with images like `example_input` [B, C, H, W]. The model is in eval mode afterwards.

    Raises UserError, with the name of the layer, if the model cannot be traced or its channels cannot be followed.
    """
    module = fx.GraphModule(model, _graph(model))
    module.graph.eliminate_dead_code()
    walk = Walk(module, _shapes(module, example_input))
    for node in module.graph.nodes:
        walk.enter(node)
    flatten_by_name(walk)
    module.graph.eliminate_dead_code()  # the sizes that views read
    return Traced(module, walk.features, walk.images, count(walk.features[module.graph.output_node().all_input_nodes[0]]))


class _Tracer(fx.Tracer):
    """Treats subclasses of convolutions, linear layers and norms as one layer each, so that errors name them."""

    failed = ""
    proxy_buffer_attributes = True  # as for parameters, so that computations with buffers are part of the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear, *NORMS)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)  # the innermost module is the first to fail
            raise


def _graph(model: nn.Module) -> fx.Graph:
    graphs, roots = [], (copied(model).train(), model.eval())  # two, because tracing keeps numbered constants in the model
    for root in roots:
        tracer = _Tracer()
        try:
            graphs.append(tracer.trace(root))
        except Exception as error:  # code of the model can do anything with a proxy instead of a tensor
            raise UserError(f"{tracer.failed or type(model).__name__}: cannot be traced: {reason_of(error)}") from None
    constants = [node.target for node in graphs[0].find_nodes(op="get_attr") if node.target.startswith("_tensor_constant")]
    if str(graphs[0]) != str(graphs[1]) or not all(torch.equal(*(getattr(root, name) for root in roots)) for name in constants):
        raise UserError(
            f"{type(model).__name__}: its forward() differs between train and eval mode: use nn.Dropout, and one output in both"
        )
    for node in graphs[1].find_nodes(op="placeholder")[1:]:
        if node.users:
            raise UserError(f"{type(model).__name__}: takes {node.target} beside the images")
        graphs[1].erase_node(node)
    return graphs[1]


class _Shapes(fx.Interpreter):
    """Runs the graph and records the shape of each tensor; an empty shape for a tuple of tensors."""

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
        interpreter.run(torch.cat([example_input[:1]] * 2))  # two images: a batch dimension of 1 could be mistaken for another one
    except Exception as error:  # as above
        raise UserError(f"example_input {list(example_input.shape)} does not pass through the model: {reason_of(error)}") from None
    return interpreter.shapes
