"""A network whose hard router hides gradients on purpose. Attacks that only follow gradients overestimate its robustness.

Shapes: B images, N experts, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks import BatchDraws, Pgd, frozen, pgd
from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset
from advmoe.data.images import limit
from advmoe.moe import HARD, Gate, Mixed, OneHot, Routing, Scaled

EPSILON = 0.1


def images() -> Splits:
    """The embedded Fashion-MNIST."""
    return load_dataset(DataConfig(dataset="fashion-mnist"))


def small_cnn(width: int = 8, classes: int = 10) -> nn.Sequential:
    """A CNN of two convolutions for images [B, 1, 28, 28] -> [B, K]."""
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
        """The logits of the router, [B, N]."""
        logits: Tensor = self.router(self.features(x))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        """Logits [B, K], and the Routing of the router."""
        routing = self.routing_logits(x)
        weights = gate.weights(routing, 0)
        if isinstance(weights, OneHot | Mixed):
            outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed = (weights.mixture[:, :, None] * outputs).sum(dim=1)
        else:
            mixed = self._dispatch(x, weights.experts)
        if isinstance(weights, Scaled):
            mixed = mixed * weights.factor[:, None]
        return mixed, [Routing(routing, weights.experts)]

    def _dispatch(self, x: Tensor, experts: Tensor) -> Tensor:
        """Run each image through only its expert."""
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
    """The network, trained in about 20 s on one thread; `settings` are passed to `train`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Planted()
    train(model, seed, **settings)
    return model
