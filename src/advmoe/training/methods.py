"""The methods (appendix, table A1), as data: a kind of network, and phases with their step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from advmoe.config import ModelConfig, RunConfig
from advmoe.config.choices import MethodTraits
from advmoe.entries import Entries, check_accepts, check_kind
from advmoe.errors import UserError, lookup
from advmoe.moe import DenseKind, MaskedKind, MoEKind, RoutedNetwork
from advmoe.training import steps
from advmoe.training.losses import lookup_loss

Score = Literal["val_ra", "val_sa"]
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
    selects: Score = "val_ra"

    @property
    def two_levels(self) -> bool:
        """Whether a phase trains the routers in a separate level."""
        return any("routers" in phase.levels for phase in self.phases)


def traits(method: Method) -> MethodTraits:
    """The properties of the method that recipes use."""
    model, kind = ModelConfig(), method.kind
    return MethodTraits(
        scaled=kind(model.replace(model_scale=model.model_scale / 2)) != kind(model),
        routed=kind(model.replace(num_experts=model.num_experts + 1)) != kind(model),
        attacked=method.loss is None or lookup_loss(method.loss).attack is not None,
        fixed_loss=method.loss is not None,
        two_levels=method.two_levels,
        phases=len(method.phases),
    )


LEVELS: dict[str, Callable[[RoutedNetwork], list[nn.Parameter]]] = {
    "all": lambda model: list(model.parameters()),
    "weights": RoutedNetwork.weight_parameters,
    "routers": RoutedNetwork.router_parameters,
    "masks": RoutedNetwork.mask_parameters,
}


NEEDED_KIND: dict[str, type[DenseKind]] = {"routers": MoEKind, "masks": MaskedKind}  # without it the level has no parameters


def dense(config: ModelConfig) -> DenseKind:
    """The full network."""
    return DenseKind(activation=config.activation)


def small_dense(config: ModelConfig) -> DenseKind:
    """A network with r times the width in every layer, the stem included."""
    return DenseKind(config.model_scale, activation=config.activation)


def moe(config: ModelConfig) -> DenseKind:
    """Experts with r times the width. In a ResNet the stem keeps its dense width."""
    return MoEKind(config.model_scale, config.num_experts, config.bank, config.routers, config.norms, activation=config.activation)


def masked(config: ModelConfig) -> DenseKind:
    """The full network with masks that keep the fraction r of every layer's channels."""
    return MaskedKind(config.model_scale, activation=config.activation)


ONE_LEVEL = (Phase(steps.single_level, ("all",)),)
METHODS = Entries({
    "standard": Method(dense, ONE_LEVEL, loss="clean", selects="val_sa"),
    "at_dense": Method(dense, ONE_LEVEL),
    "at_small_dense": Method(small_dense, ONE_LEVEL),
    "at_sparse": Method(masked, (Phase(steps.single_level, ("masks",)), Phase(steps.single_level, ("weights",)))),
    "at_moe": Method(moe, ONE_LEVEL),
    "advmoe": Method(moe, (Phase(steps.two_level, ("routers", "weights")),)),
})  # fmt: skip


def lookup_method(name: str) -> Method:
    """The entry of METHODS. Raises UserError if there is none, or if a user's entry has a part that training cannot use."""
    method, what = lookup(METHODS, name, "method"), f"method '{name}'"
    check_kind(what, method, Method)
    check_accepts(f"{what}: kind", method.kind, "config")
    kind = method.kind(ModelConfig())
    check_kind(f"{what}: the result of kind", kind, DenseKind)
    if not isinstance(method.phases, tuple) or not method.phases:
        raise UserError(f"{what}: phases must be a tuple of at least one Phase: (Phase(step, levels),)")
    for phase in method.phases:
        _check_phase(what, phase, kind)
    if method.loss is not None:
        lookup_loss(method.loss)
    if method.selects not in get_args(Score):
        raise UserError(f"{what}: selects must be {' or '.join(get_args(Score))}, not {method.selects}")
    return method


def total_epochs(config: RunConfig) -> int:
    """The epochs of all phases of a run. Raises UserError if its method is unknown."""
    return config.training.epochs * len(lookup_method(config.method).phases)


def _check_phase(what: str, phase: Phase, kind: DenseKind) -> None:
    check_kind(f"{what}: a phase", phase, Phase)
    check_accepts(f"{what}: the step of a phase", phase.step, "state", "batches")
    if not isinstance(phase.levels, tuple) or not phase.levels:
        raise UserError(f"{what}: levels must be a tuple of at least one name, such as ('weights',)")
    if len(phase.levels) > 2 or len(set(phase.levels)) < len(phase.levels):
        raise UserError(f"{what}: a phase trains one level or two different ones, not {', '.join(map(str, phase.levels))}")
    for level in phase.levels:
        lookup(LEVELS, level, f"level of {what}:")
        needed = NEEDED_KIND.get(level, DenseKind)
        if not isinstance(kind, needed):
            raise UserError(f"{what}: the level {level} needs a {needed.__name__}, and kind returns a {type(kind).__name__}")
