"""Terms that are added to the loss in every update in which routers learn.

Shapes: B images, N experts, L MoE layers. A term is one entry in `TERMS`; its weight is a field of the configuration.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.config import TrainingConfig
from advmoe.moe import Routings, balance
from advmoe.training.losses import Outcome

MARGIN = 1.0  # between the top two router logits


def router_terms(training: TrainingConfig, outcome: Outcome, y: Tensor) -> list[Tensor]:
    """The weighted terms that the configuration asks for, each a scalar; `y` [B] are the labels, or the groups of the labels."""
    return [weight * value(training, outcome, y) for weigh, value in TERMS if (weight := weigh(training))]


def target_term(outcome: Outcome, y: Tensor) -> Tensor:
    """Cross-entropy of the router logits against y modulo N, mean over the layers, over x and x', and over the images.

    The router target of the public AdvMoE code, which has one router. For the target `confusion`, `y` are groups from 0 to N - 1.
    """
    passes = [outcome.routings, outcome.robust_routings] if outcome.robust_routings is not outcome.routings else [outcome.routings]
    return torch.stack([target(routings, y) for routings in passes if routings]).mean()


def consistency(clean: Routings, robust: Routings) -> Tensor:
    """Sum over the layers of the mean KL(softmax(z) || softmax(z')) of the router logits z, z' [B, N]."""
    return torch.stack(
        [
            F.kl_div(b.logits.log_softmax(dim=1), a.logits.log_softmax(dim=1), reduction="batchmean", log_target=True)
            for a, b in zip(clean, robust, strict=True)
        ]
    ).sum()


def margin(routings: Routings) -> Tensor:
    """Sum over the layers of the mean hinge on the gap between the top two router logits; 0 for layers of one expert."""
    hinges = [
        (MARGIN - (top[:, 0] - top[:, 1])).clamp(min=0).mean()
        for top in (routing.logits.topk(2, dim=1).values for routing in routings if routing.logits.shape[1] > 1)
    ]
    return torch.stack(hinges).sum() if hinges else routings[0].logits.new_zeros(())


def target(routings: Routings, y: Tensor) -> Tensor:
    """Mean over the layers of the cross-entropy of the router logits [B, N] against y modulo N."""
    return torch.stack([F.cross_entropy(routing.logits, y % routing.logits.shape[1]) for routing in routings]).mean()


TERMS: list[tuple[Callable[[TrainingConfig], float], Callable[[TrainingConfig, Outcome, Tensor], Tensor]]] = [
    (
        lambda training: training.balance_weight if training.balance != "none" else 0.0,
        lambda training, outcome, y: balance(training.balance, outcome.routings),
    ),
    (
        lambda training: training.router_target_weight if training.router_target != "none" else 0.0,
        lambda training, outcome, y: target_term(outcome, y),
    ),
    (
        lambda training: training.router_consistency,
        lambda training, outcome, y: consistency(outcome.routings, outcome.robust_routings),
    ),
    (lambda training: training.router_margin, lambda training, outcome, y: margin(outcome.robust_routings)),
]
