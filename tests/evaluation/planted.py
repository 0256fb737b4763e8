"""Networks with a weakness planted on purpose: one hard router, and faults that flatter robust accuracy.

Shapes: B images, N experts, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks import BatchDraws, Pgd, frozen, pgd
from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset
from advmoe.data.images import limit
from advmoe.moe import HARD, Gate, Routing

EPSILON = 0.1


def images() -> Splits:
    """The embedded Fashion-MNIST."""
    return load_dataset(DataConfig(dataset="fashion-mnist"))


def small_cnn(width: int = 8, classes: int = 10) -> nn.Sequential:
    """[B, 1, 28, 28] -> [B, K]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 49, classes),
    )  # fmt: skip


class Planted(nn.Module):
    """Four experts, each a small CNN, behind one router: a strided convolution of 8 channels, pooled to 4x4, linear."""

    def __init__(self, experts: int = 4, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.router = nn.Linear(8 * 16, experts)
        self.experts = nn.ModuleList(small_cnn(width, classes) for _ in range(experts))

    def routing_logits(self, x: Tensor) -> Tensor:
        """The router's [B, N]."""
        logits: Tensor = self.router(self.features(x))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        """Class logits [B, K] and the one layer's decision."""
        routing = self.routing_logits(x)
        weights = gate.weights(routing, 0)
        if weights.mixture is not None:
            outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed = (weights.mixture[:, :, None] * outputs).sum(dim=1)
        else:
            mixed = self._dispatch(x, weights.experts)
        if weights.factor is not None:
            mixed = mixed * weights.factor[:, None]
        return mixed, [Routing(routing, weights.experts)]

    def _dispatch(self, x: Tensor, experts: Tensor) -> Tensor:
        """Every image through its own expert alone."""
        groups = [(experts == number).nonzero()[:, 0] for number in range(len(self.experts))]
        parts = [expert(x[rows]) for expert, rows in zip(self.experts, groups, strict=True)]
        return torch.cat(parts)[torch.cat(groups).argsort()]


def train(model: nn.Module, seed: int, epochs: int = 3, batch_size: int = 100, steps: int = 3, count: int = 6000) -> nn.Module:
    """Naive adversarial training: PGD on cross-entropy through the hard gate, then a step on cross-entropy at x'."""
    data, generator = limit(images().train, count), torch.Generator().manual_seed(seed)
    x, y, draws = data.pixels(), data.labels, BatchDraws(generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    total = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=total)
    attack = Pgd(EPSILON, EPSILON / 2.5, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size)[: len(x) // batch_size]:
            with frozen(model):
                x_adv = pgd(model, x[rows], y[rows], attack, draws)
            loss = F.cross_entropy(model(x_adv), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def planted(seed: int, **settings: int) -> Planted:
    """The network of the central claim, trained in about 20 s at one thread; `settings` go to `train`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Planted()
    train(model, seed, **settings)
    return model


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
        if gate.kind != "hard":
            return super().forward_routed(x, gate)
        drawn = self.routing_logits(x).softmax(dim=1).multinomial(1)
        logits, routings = super().forward_routed(x, Gate("forced", route=drawn))
        return logits, routings


class NoisyLogits(Planted):
    """Routing logits with noise in every forward."""

    def routing_logits(self, x: Tensor) -> Tensor:
        logits = super().routing_logits(x)
        return logits + torch.randn_like(logits)


class UnsettledTies(Planted):
    """A router that holds all experts equal and leaves the choice to chance."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        drawn = torch.randint(len(self.experts), (len(x), 1))
        logits, routings = super().forward_routed(x, Gate("forced", route=drawn))
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
