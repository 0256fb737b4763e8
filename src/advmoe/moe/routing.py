"""The router, the gates, and the routing decision that they return.

Shapes: B images, C channels, N experts, L MoE layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from advmoe.distributed import pooled_statistics
from advmoe.entries import Entries, check_accepts, check_kind
from advmoe.errors import UserError, lookup

MOMENTUM = 0.1  # of every running statistic


class Routing(NamedTuple):
    """The decision of one layer for a batch. A forward pass returns it; it is never stored."""

    logits: Tensor  # [B, N] float32, of the router
    experts: Tensor  # [B] int64, the expert that was run (under mixing gates: the top-1)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Only the chosen `experts` [B] int64 run."""

    experts: Tensor


@dataclass(frozen=True, eq=False)
class Scaled(Chosen):
    """The chosen experts run, and their outputs are multiplied by `factor` [B]."""

    factor: Tensor


@dataclass(frozen=True, eq=False)
class OneHot(Chosen):
    """`mixture` [B, N] is one-hot. The output is that of the chosen experts.

    With one norm for each expert every expert runs; otherwise the dispatch decides.
    """

    mixture: Tensor


@dataclass(frozen=True, eq=False)
class Mixed(Chosen):
    """Every expert runs. The output is the sum of their outputs, weighted by `mixture` [B, N]. `experts` are the top-1."""

    mixture: Tensor


class Gate(ABC):
    """Turns routing logits into the weights of the experts. A gate is an argument of the forward pass.

    In the subclasses, q is the softmax of logits / temperature, k the top-1 expert, 1_k the one-hot vector of k, and sg means
    stop-gradient. A new gate is a subclass; an entry in `GATES` gives it a name for the configuration.
    """

    def __new__(cls, *settings: Any, **named: Any) -> Self:
        if cls is Gate:
            raise TypeError("Gate is abstract: write make_gate('soft', temperature=2.0), or SoftGate(2.0)")
        return super().__new__(cls)

    @abstractmethod
    def weights(self, logits: Tensor, layer: int) -> Chosen:
        """The weights of MoE layer number `layer` for its `logits` [B, N]: `Chosen` or one of its subclasses."""


@dataclass(frozen=True, eq=False)
class HardGate(Gate):
    """1_k: only the top-1 expert runs. This is the gate of inference."""

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        return Chosen(top1(logits))


@dataclass(frozen=True, eq=False)
class TemperedGate(Gate):
    """Base class of the gates that use q. Raises ValueError if `temperature` is not positive."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def p(self, logits: Tensor) -> Tensor:
        """q, the softmax of logits / temperature, [B, N]."""
        return (logits / self.temperature).softmax(dim=1)


class StraightThroughGate(TemperedGate):
    """1_k + q - sg(q): the value of 1_k, the gradient of q."""

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        q, experts = self.p(logits), top1(logits)
        one_hot = torch.zeros_like(q).scatter_(1, experts[:, None], 1.0)
        return OneHot(experts, one_hot + (q - q.detach()))


class ScaledGate(TemperedGate):
    """Only expert k runs. Its output is multiplied by 1 + q_k - sg(q_k), which is 1 with the gradient of q_k."""

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        experts = top1(logits)
        chosen = self.p(logits).gather(1, experts[:, None])[:, 0]
        return Scaled(experts, 1 + (chosen - chosen.detach()))


class SoftGate(TemperedGate):
    """q: every expert runs, and the outputs are mixed."""

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        return Mixed(top1(logits), self.p(logits))


@dataclass(frozen=True, eq=False)
class ForcedGate(Gate):
    """The experts of `route` [B, L] int64 run. With -1, the router chooses."""

    route: Tensor

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        forced = self.route[:, layer]
        return Chosen(torch.where(forced < 0, top1(logits), forced))


@dataclass(frozen=True, eq=False)
class FixedGate(Gate):
    """The `chosen` weights for every layer: what another gate returned for the logits of a router that they share."""

    chosen: Chosen

    def weights(self, logits: Tensor, layer: int) -> Chosen:
        return self.chosen


HARD = HardGate()
# the gates that a configuration can name
GATES: Entries[Callable[..., Gate]] = Entries({
    "hard": HardGate, "straight_through": StraightThroughGate, "scaled": ScaledGate, "soft": SoftGate,
})  # fmt: skip


def make_gate(name: str, **settings: Any) -> Gate:
    """The gate `name` of `GATES`, with its settings (`temperature`). Raises UserError if the name is unknown."""
    return lookup(GATES, name, "gate")(**settings)


def check_gate(name: str, num_experts: int) -> None:
    """Raises UserError if the gate `name` cannot be made without settings, or does not return the weights of experts."""
    what, logits = f"gate '{name}'", torch.zeros(2, num_experts)
    check_accepts(what, lookup(GATES, name, "gate"))
    gate = make_gate(name)
    check_kind(what, gate, Gate)
    check_accepts(f"{what}: weights", gate.weights, "logits", "layer")
    with torch.random.fork_rng(devices=[]):  # a gate may add noise
        weights = gate.weights(logits, 0)
    check_kind(f"{what}: the result of weights", weights, Chosen)
    experts = weights.experts
    if experts.shape != (2,) or experts.dtype != torch.int64 or bool(((experts < 0) | (experts >= num_experts)).any()):
        raise UserError(f"{what}: experts must be int64 [B] from 0 to {num_experts - 1}, not {experts.tolist()}")
    for field, shape in (("mixture", (2, num_experts)), ("factor", (2,))):
        value = getattr(weights, field, None)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            actual = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{what}: for 2 images and {num_experts} experts, {field} must have the shape {list(shape)}, not {actual}"
            )


def top1(logits: Tensor) -> Tensor:
    """[B, N] -> [B] int64: the expert with the largest logit."""
    return logits.detach().argmax(dim=1)


class Router(nn.Module):
    """Global average pooling of the layer's input, standardisation by running statistics, then a linear layer to N float32 logits.

    In train mode the statistics are updated with each batch: first as a plain average, later with `momentum`. In eval mode they
    are fixed, so the route of an image does not depend on the other images of its batch.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    synchronised = False

    def __init__(self, in_channels: int, num_experts: int, momentum: float = MOMENTUM) -> None:
        super().__init__()
        self.momentum = momentum
        self.linear = nn.Linear(in_channels, num_experts)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("var", torch.ones(in_channels))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, N] of inputs [B, C, H, W]."""
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(self.mean.dtype).mean(dim=(2, 3))
            if self.training:
                self._track(values.detach())
            logits: Tensor = self.linear((values - self.mean) * (self.var + 1e-5).rsqrt())
            return logits

    @torch.no_grad()
    def folded(self) -> "FoldedRouter":
        """This router in eval mode as one linear layer on the pooled input. It computes the same logits, up to rounding."""
        weight = self.linear.weight.double() * (self.var.double() + 1e-5).rsqrt()
        bias = self.linear.bias.double() - weight @ self.mean.double()
        return FoldedRouter(weight.T.to(self.mean.dtype).contiguous(), bias.to(self.mean.dtype))

    @torch.no_grad()
    def _track(self, values: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=self.momentum)
        mean, var = values.mean(dim=0), values.var(dim=0, correction=0)
        if self.synchronised:
            _, mean, var = pooled_statistics(values.new_full((), len(values)), mean, var)
        self.var.lerp_(var, share)
        self.mean.lerp_(mean, share)


class FoldedRouter(nn.Module):
    """A router for inference: `weight` [C, N] and `bias` [N] hold the linear layer and the standardisation."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, N] of inputs [B, C, H, W], in the dtype of the weights, also under autocast."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x)  # type: ignore[no-any-return]
        return torch.addmm(self.bias, x.mean(dim=(2, 3), dtype=self.weight.dtype), self.weight)  # in float16 a sum could overflow
