"""Networks of a few weights on images [B, 1, 6, 6], for fast evaluations."""

import torch
from torch import Tensor, nn

from advmoe.moe import HARD, Gate, Routing

CLASSES = 4


class ToyMoE(nn.Module):
    """Implements only the documented routing protocol: a layer of two linear experts, then one of three."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"routers": ((2, 36), (3, 8)), "experts": ((2, 8, 36), (3, 8, 8))}
        draw = {name: [torch.randn(shape, generator=generator) for shape in pair] for name, pair in shapes.items()}
        self.routers, self.experts = (nn.ParameterList(draw[name]) for name in ("routers", "experts"))
        self.head = nn.Parameter(torch.randn(CLASSES, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        h, routings = 2 * x.flatten(1) - 1, []
        for layer, (router, experts) in enumerate(zip(self.routers, self.experts, strict=True)):
            logits = h @ router.T
            weights = gate.weights(logits, layer)
            mixture = getattr(weights, "mixture", None)
            if mixture is None:
                mixture = nn.functional.one_hot(weights.experts, len(experts)).to(h)
            h = torch.einsum("bn,nki,bi->bk", mixture, experts, h).tanh()
            routings.append(Routing(logits, weights.experts))
        return h @ self.head.T, routings


def dense_network(classes: int = CLASSES) -> nn.Module:
    """A plain network without routing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, classes)).eval()


def images(count: int = 12, seed: int = 1) -> Tensor:
    """[count, 1, 6, 6] in [0, 1]."""
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def labels(model: nn.Module, x: Tensor, wrong: int = 3) -> Tensor:
    """The network's predictions, changed for the image number `wrong`."""
    y = model(x).argmax(dim=1)
    y[wrong] = (y[wrong] + 1) % CLASSES
    return y
