"""Networks with a weakness planted on purpose: one hard router, and faults that flatter robust accuracy.

Shapes: B images, N experts, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks import Pgd
from advmoe.benchmark.planted import Planted, images, small_cnn
from advmoe.data.images import limit
from advmoe.moe import HARD, ForcedGate, Gate, HardGate, Routing

# faults: each takes the sound network's weights


class CutLogits(Planted):
    """The router's logits carry no gradient."""

    def routing_logits(self, x: Tensor) -> Tensor:
        return super().routing_logits(x).detach()


class CutInput(Planted):
    """The router's pooled input carries no gradient."""

    def routing_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.router(self.features(x).detach())
        return logits


class ThousandfoldLogits(Planted):
    """Class logits times 1000: cross-entropy saturates, and its gradient is 0."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return 1000 * logits, routings


class StochasticGate(Planted):
    """Under the hard gate the expert is drawn by the router's probabilities; its logits stay what they are."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        if not isinstance(gate, HardGate):
            return super().forward_routed(x, gate)
        drawn = self.routing_logits(x).softmax(dim=1).multinomial(1)
        logits, routings = super().forward_routed(x, ForcedGate(drawn))
        return logits, routings


class NoisyLogits(Planted):
    """Routing logits with noise in every forward."""

    def routing_logits(self, x: Tensor) -> Tensor:
        logits = super().routing_logits(x)
        return logits + torch.randn_like(logits)


class UnsettledTies(Planted):
    """A router that holds all experts equal and leaves the choice to chance, unless the gate names the expert."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        drawn = torch.randint(len(self.experts), (len(x), 1))
        logits, routings = super().forward_routed(x, gate if isinstance(gate, ForcedGate) else ForcedGate(drawn))
        return logits, [Routing(0 * routing.logits, routing.experts) for routing in routings]


class NanRouter(Planted):
    """Routing logits are NaN: argmax takes expert 0 and the class logits look sound."""

    def routing_logits(self, x: Tensor) -> Tensor:
        return super().routing_logits(x) * torch.nan


class NanNetwork(Planted):
    """Class logits are NaN."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return logits * torch.nan, routings


class SoftmaxOutputs(Planted):
    """Probabilities instead of logits."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return logits.softmax(dim=1), routings


def with_fault(model: Planted, fault: type[Planted]) -> Planted:
    """The same weights with a fault."""
    copy = fault()
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def clamp_in_graph(settings: Pgd, seed: int) -> Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]:
    """PGD on a perturbation, its gradient taken through the clamp to [0, 1]: a pixel once outside never moves again."""

    def attack(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        delta = settings.epsilon * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 1)
        for _ in range(settings.num_steps):
            leaf = delta.detach().requires_grad_(True)
            loss = F.cross_entropy(predict((x + leaf).clamp(0, 1)), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            delta = (delta + settings.step_size * gradient.sign()).clamp(-settings.epsilon, settings.epsilon)
        return (x + delta).clamp(0, 1)

    return attack


def clamp_outside_graph(settings: Pgd, seed: int) -> Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]:
    """The sound twin of `clamp_in_graph`."""

    def attack(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        noise = settings.epsilon * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 1)
        x_adv = (x + noise).clamp(0, 1)
        for _ in range(settings.num_steps):
            leaf = x_adv.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(predict(leaf), y, reduction="sum"), leaf)
            moved = x_adv + settings.step_size * gradient.sign()
            x_adv = torch.min(torch.max(moved, x - settings.epsilon), x + settings.epsilon).clamp(0, 1)
        return x_adv

    return attack


def train_clean(seed: int, count: int, epochs: int = 4) -> nn.Module:
    """One small CNN, trained on clean images."""
    data, generator = limit(images().train, count), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn()
    x, y, optimiser = data.pixels(), data.labels, torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model.eval()
