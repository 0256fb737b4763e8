"""What stops a run: anything that is not finite; and what a run warns of: one expert taking over."""

import torch

from advmoe.models import Classifier
from advmoe.training.losses import Outcome

COLLAPSE = 0.95


class NonFinite(Exception):
    """A NaN or infinity, with the name of the tensor that holds it."""


def check_outcome(outcome: Outcome, level: str) -> None:
    """Raises NonFinite where the loss, logits or router logits of a step are not finite."""
    named = {f"logits of layer {i}'s router": routing.logits for i, routing in enumerate(outcome.routings)}
    named |= {f"{name} logits": logits for name in ("clean", "robust") if (logits := getattr(outcome, name)) is not None}
    named["loss"] = outcome.total
    _check({f"{name} ({level} update)": tensor.detach() for name, tensor in named.items()})


def check_gradients(model: Classifier, level: str) -> None:
    """Raises NonFinite where a parameter's gradient is not finite."""
    parameters = model.named_parameters()
    _check({f"gradient of {name} ({level} update)": p.grad for name, p in parameters if p.grad is not None})


def collapsed_layers(load: torch.Tensor) -> list[tuple[int, int, float]]:
    """(layer, expert, share) where one of several experts has more than 95 % of the pictures; `load` is [L, N] counts."""
    if load.shape[1] < 2:
        return []
    shares, experts = (load / load.sum(dim=1, keepdim=True)).max(dim=1)
    rows = enumerate(zip(experts.tolist(), shares.tolist(), strict=True))
    return [(layer, expert, share) for layer, (expert, share) in rows if share > COLLAPSE]


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """One look at the sum of all (one device synchronisation); the culprit is searched only if that is not finite."""
    total = torch.stack([tensor.float().sum() for tensor in tensors.values()]).sum()
    if torch.isfinite(total):
        return
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFinite(name)
