"""Checks of a run: values that are not finite stop it, and an expert that gets nearly all images gives a warning."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from advmoe import distributed
from advmoe.models import Classifier
from advmoe.moe import Router
from advmoe.training.losses import Outcome

COLLAPSE = 0.95  # share of a router's images above which one expert has nearly all


class NonFinite(Exception):
    """A tensor contains a NaN or an infinity. The message is the name of the tensor."""


class Watch:
    """Collects tensors that must be finite. Only `check` reads them; it synchronises with the device once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.peaks: list[Tensor] = []  # the largest magnitude in each tensor, on its device

    def outcome(self, outcome: Outcome, level: str) -> None:
        """Add the loss, logits and router logits of a step."""
        named = {f"logits of router {i}": routing.logits for i, routing in enumerate(outcome.routings)}
        if outcome.robust_routings is not outcome.routings:
            named |= {f"logits of router {i} on x'": routing.logits for i, routing in enumerate(outcome.robust_routings)}
        named |= {f"{name} logits": logits for name in ("clean", "robust") if (logits := getattr(outcome, name)) is not None}
        self._add(named | {"loss": outcome.total}, level)

    def gradients(self, model: Classifier, level: str) -> None:
        """Add the gradients of the parameters that learn."""
        learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        self._add({f"gradient of {name}": gradient for name, gradient in learning.items()}, level)

    def network(self, model: Classifier) -> None:
        """Add the parameters and the running statistics."""
        tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point() and tensor.numel()}
        names, peaks = list(tensors), torch._foreach_norm(list(tensors.values()), torch.inf)
        self.names, self.peaks = self.names + names, [*self.peaks, *(peak.float() for peak in peaks)]

    def failed(self) -> Tensor:
        """1 if any tensor so far is not finite, else 0: a float32 scalar on the device."""
        return self._bad().any().float()

    def check(self) -> None:
        """Clear the collected tensors. Raises NonFinite with the name of the first one that is not finite."""
        if not self.peaks:
            return
        names, bad = self.names, self._bad()
        self.names, self.peaks = [], []
        if bad.any():
            raise NonFinite(names[bad.tolist().index(True)])

    def _bad(self) -> Tensor:
        """Which tensors are not finite on some rank: [names] bool."""
        return distributed.any_rank(~torch.isfinite(torch.stack(self.peaks)))

    @torch.no_grad()
    def _add(self, tensors: dict[str, Tensor], level: str) -> None:
        self.names += [f"{name} ({level} update)" for name in tensors]
        self.peaks += [peak.float() for peak in torch._foreach_norm(list(tensors.values()), torch.inf)]


def router_cosines(model: Classifier, start: Classifier) -> list[float]:
    """The cosine between the weights of each router in `model` and in `start`, the network that training began with.

    The mean over the experts, which changes no choice, is subtracted first. 1 means that a router still divides its inputs as it
    was drawn. Empty if there is one expert only, or one router for the network, whose features change too.
    """
    pairs = zip(model.routers(), start.routers(), strict=True)
    return [
        cosine_similarity(_contrasts(now), _contrasts(then), dim=0).item()
        for now, then in pairs
        if isinstance(now, Router) and isinstance(then, Router) and len(now.linear.weight) > 1
    ]


def _contrasts(router: Router) -> Tensor:
    """The weights [N * C] of a router without their mean over the experts."""
    weight = router.linear.weight.detach().float().cpu()
    return (weight - weight.mean(dim=0)).flatten()


def collapsed_routers(load: Tensor) -> list[tuple[int, int, float]]:
    """(router, expert, share) of each expert that gets more than 95 % of a router's images. `load` [L, N] counts images.

    Empty if there is one expert only.
    """
    if load.shape[1] < 2:
        return []
    shares, experts = (load / load.sum(dim=1, keepdim=True)).max(dim=1)
    rows = enumerate(zip(experts.tolist(), shares.tolist(), strict=True))
    return [(router, expert, share) for router, (expert, share) in rows if share > COLLAPSE]
