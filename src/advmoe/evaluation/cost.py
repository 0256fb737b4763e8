"""The cost of a network: parameters, and GMACs (multiply-accumulates for one image, in billions)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.attacks import frozen
from advmoe.models import Classifier
from advmoe.moe import MoEConv2d

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer, by its name in the network. A convolution includes the parameters of its batch norm. A router has a
    separate row, and so has a batch norm outside of a convolution."""

    name: str
    params: int
    gmacs_ideal: float
    gmacs_executed: float


@dataclass(frozen=True)
class Cost:
    """`gmacs_ideal` counts the chosen experts, routers, convolutions and linear layers. `gmacs_executed` counts what torch
    really ran, also products outside of layers, as in attention."""

    params: int
    gmacs_ideal: float
    gmacs_executed: float
    layers: tuple[LayerCost, ...] = ()


def cost(model: Classifier, shape: Shape) -> Cost:
    """The cost of one image [C, H, W], in total and of each layer."""
    with _countable(model), FlopCounterMode(display=False) as counter:
        ideal = layer_macs(model, layer_positions(model, shape))
    executed = _executed(model, counter)
    params = layer_params(model)
    layers = tuple(LayerCost(name, params[name], ideal.get(name, 0) / 1e9, executed.get(name, 0) / 1e9) for name in params)
    return Cost(sum(params.values()), sum(ideal.values()) / 1e9, _macs(counter, "Global") / 1e9, layers)


@contextmanager
def _countable(model: Classifier) -> Iterator[None]:
    """Inside the block, layers with the dispatch triton use split, which computes the same products: torch cannot count those of
    Triton's kernels."""
    layers = [layer for layer in model.moe_layers() if layer.dispatch == "triton"]
    try:
        for layer in layers:
            layer.dispatch = "split"
        yield
    finally:
        for layer in layers:
            layer.dispatch = "triton"


@torch.no_grad()
def layer_positions(model: Classifier, shape: Shape) -> dict[str, int]:
    """Number of output positions of each counted layer for one image, over all its calls: H' * W', or 1 for a linear layer on
    [B, features]."""
    layers = counted_layers(model)
    positions = dict.fromkeys(layers, 0)

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, _: object, output: Tensor | tuple[Tensor, object]) -> None:
            y = output[0] if isinstance(output, tuple) else output
            positions[name] += y.numel() // y.shape[-1 if isinstance(module, nn.Linear) else 1]

        return keep

    handles = [layer.register_forward_hook(keeper(name)) for name, layer in layers.items()]
    try:
        with frozen(model):
            model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return positions


def layer_macs(model: Classifier, positions: dict[str, int]) -> dict[str, int]:
    """Ideal multiply-accumulates of each counted layer."""
    return {name: positions[name] * _weights(layer) for name, layer in counted_layers(model).items()}


def layer_params(model: Classifier) -> dict[str, int]:
    """Parameters of each layer, in order; a counted layer includes those of its submodules that are not counted."""
    layers, params = counted_layers(model), dict[str, int]()
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        candidates = [owner, *(owner.rsplit(".", cut)[0] for cut in range(1, owner.count(".") + 1))]
        target = next((target for target in candidates if target in layers), owner)
        params[target] = params.get(target, 0) + parameter.numel()
    return params


def counted_layers(model: Classifier) -> dict[str, nn.Module]:
    """The layers that multiply by weights, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | MoEConv2d)}


def _weights(layer: nn.Module) -> int:
    """Number of weights that multiply one position of an image."""
    if isinstance(layer, MoEConv2d):
        return layer.width * layer.filters[0].numel()
    assert isinstance(layer.weight, Tensor)
    return layer.weight.numel()


def _executed(model: Classifier, counter: FlopCounterMode) -> dict[str, int]:
    """Multiply-accumulates that torch ran in each counted layer, without those in counted layers inside it."""
    inclusive = {name: _macs(counter, f"{type(model).__name__}.{name}") for name in counted_layers(model)}
    return {
        name: macs - sum(inclusive[child] for child in inclusive if child.startswith(f"{name}."))
        for name, macs in inclusive.items()
    }


def _macs(counter: FlopCounterMode, name: str) -> int:
    return sum(counter.get_flop_counts().get(name, {}).values()) // 2
