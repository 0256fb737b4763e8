"""The methods (appendix, table A1), as data: a kind of network, and phases with their step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from advmoe.config import ModelConfig
from advmoe.config.choices import MethodTraits
from advmoe.moe import DenseKind, MaskedKind, MoEKind, RoutedNetwork
from advmoe.training import steps

Step = Callable[[steps.TrainState, Mapping[str, steps.Batch]], steps.Metrics]


@dataclass(frozen=True)
class Phase:
    """`step` runs once per iteration. `levels` names the parameter sets that learn; each has an optimizer and batches."""

    step: Step
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """`loss` replaces the configured loss if the method has only one. `selects` names the held-out figure that selects the best
    epoch."""

    kind: Callable[[ModelConfig], DenseKind]
    phases: tuple[Phase, ...]
    loss: str | None = None
    selects: str = "val_ra"


def traits(method: Method) -> MethodTraits:
    """The properties of the method that recipes use."""
    model, kind = ModelConfig(), method.kind
    return MethodTraits(
        scaled=kind(model.replace(model_scale=model.model_scale / 2)) != kind(model),
        routed=kind(model.replace(num_experts=model.num_experts + 1)) != kind(model),
        attacked=method.loss is None,  # a method that fixes the loss trains on clean images
        two_levels="routers" in method.phases[0].levels,
        phases=len(method.phases),
    )


LEVELS: dict[str, Callable[[RoutedNetwork], list[nn.Parameter]]] = {
    "all": lambda model: list(model.parameters()),
    "weights": RoutedNetwork.weight_parameters,
    "routers": RoutedNetwork.router_parameters,
    "masks": RoutedNetwork.mask_parameters,
}


def dense(config: ModelConfig) -> DenseKind:
    """The full network."""
    return DenseKind(activation=config.activation)


def small_dense(config: ModelConfig) -> DenseKind:
    """A network with r times the width in every layer, the stem included."""
    return DenseKind(config.model_scale, activation=config.activation)


def moe(config: ModelConfig) -> DenseKind:
    """Experts with r times the width. The stem keeps its dense width."""
    return MoEKind(config.model_scale, config.num_experts, config.bank, config.routers, config.norms, activation=config.activation)


def masked(config: ModelConfig) -> DenseKind:
    """The full network with masks that keep the fraction r of every layer's channels."""
    return MaskedKind(config.model_scale, activation=config.activation)


ONE_LEVEL = (Phase(steps.single_level, ("all",)),)
METHODS = {
    "standard": Method(dense, ONE_LEVEL, loss="clean", selects="val_sa"),
    "at_dense": Method(dense, ONE_LEVEL),
    "at_small_dense": Method(small_dense, ONE_LEVEL),
    "at_sparse": Method(masked, (Phase(steps.single_level, ("masks",)), Phase(steps.single_level, ("weights",)))),
    "at_moe": Method(moe, ONE_LEVEL),
    "advmoe": Method(moe, (Phase(steps.two_level, ("routers", "weights")),)),
}
