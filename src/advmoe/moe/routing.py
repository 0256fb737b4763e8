"""The router, the gates, and what a routing decision is.

Shapes: B images, C channels, N experts, L MoE layers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from advmoe.distributed import pooled_statistics

MOMENTUM = 0.1  # of every running statistic
GateKind = Literal["hard", "straight_through", "scaled", "soft", "forced"]


class Routing(NamedTuple):
    """One layer's decision for a batch. It is returned by a forward pass, never stored."""

    logits: Tensor  # [B, N] float32, the router's
    experts: Tensor  # [B] int64, the expert that was run (under mixing gates: the top-1)


class Weights(NamedTuple):
    """What a gate makes of the logits. Without `mixture` [B, N] only `experts` [B] are computed, and their outputs multiplied
    by `factor` [B] where there is one. `one_hot` says that the mixture's values are: only its gradient asks for the others."""

    experts: Tensor
    mixture: Tensor | None = None
    factor: Tensor | None = None
    one_hot: bool = False


@dataclass(frozen=True, eq=False)
class Gate:
    """How routing logits become expert weights; a value handed to a forward pass.

    With p the softmax of logits / temperature, h the one-hot of the top-1, k the top-1, sg the stop-gradient:

    - ``hard``: h. Inference.
    - ``straight_through``: h + p - sg(p). The chosen experts run forward, the others in the backward pass alone.
    - ``scaled``: expert k alone, its output times 1 + p_k - sg(p_k).
    - ``soft``: p. Every expert is computed.
    - ``forced``: the route given as `route` [B, L] (int64; -1 leaves that choice to the router).

    `logits` [B, N] are the network router's, where one choice serves every layer; the network sets them.
    """

    kind: GateKind = "hard"
    temperature: float = 1.0
    route: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.kind == "forced") != (self.route is not None):
            raise ValueError("a forced gate needs a route, and no other gate takes one")
        if self.kind not in get_args(GateKind):
            raise ValueError(f"a gate is one of {', '.join(get_args(GateKind))}, not {self.kind!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def weights(self, logits: Tensor, layer: int) -> Weights:
        """Expert weights of MoE layer number `layer` for `logits` [B, N]."""
        top1 = logits.detach().argmax(dim=1)
        if self.route is not None:
            forced = self.route[:, layer]
            return Weights(torch.where(forced < 0, top1, forced))
        if self.kind == "hard":
            return Weights(top1)
        p = (logits / self.temperature).softmax(dim=1)
        if self.kind == "soft":
            return Weights(top1, mixture=p)
        if self.kind == "scaled":
            chosen = p.gather(1, top1[:, None])[:, 0]
            return Weights(top1, factor=1 + (chosen - chosen.detach()))
        one_hot = torch.zeros_like(p).scatter_(1, top1[:, None], 1.0)
        return Weights(top1, mixture=one_hot + (p - p.detach()), one_hot=True)


HARD = Gate()


class Router(nn.Module):
    """Global average pool of the layer's input, standardised by running statistics, then linear to N logits; float32.

    The statistics follow the batches seen in train mode (the first ones in full, later ones with `momentum`) and are
    fixed in eval mode, so that an image's route never depends on the other images of its batch.
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
    def _track(self, values: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=self.momentum)
        mean, var = values.mean(dim=0), values.var(dim=0, correction=0)
        if self.synchronised:
            _, mean, var = pooled_statistics(values.new_full((), len(values)), mean, var)
        self.var.lerp_(var, share)
        self.mean.lerp_(mean, share)
