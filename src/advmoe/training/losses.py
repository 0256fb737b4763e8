"""The losses, each with the attack that finds its adversarial images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks import BatchDraws, Pgd, full, kl_divergence, pgd
from advmoe.config import AttackConfig
from advmoe.moe import Routings

Forward = Callable[[Tensor], tuple[Tensor, Routings]]


class Outcome(NamedTuple):
    """A loss and what it was computed from. `clean` and `robust` are logits [B, classes]; one of them may be missing.

    `routings` are those of the first pass, `robust_routings` those of x'; both are empty in a dense network.
    """

    total: Tensor
    clean: Tensor | None
    robust: Tensor | None
    routings: Routings
    robust_routings: Routings = ()


@dataclass(frozen=True)
class Loss:
    """`attack(forward, x, y, settings, draws)` returns x', if there is one; `value(forward, x, x', y, beta)` returns the Outcome.

    The attack gets labels [B]; the value gets labels [B] or class probabilities [B, classes]. `has_clean` says that the value
    has a pass of x beside that of x'.
    """

    attack: Callable[[Forward, Tensor, Tensor, AttackConfig, BatchDraws], Tensor] | None
    value: Callable[[Forward, Tensor, Tensor, Tensor, float], Outcome]
    has_clean: bool = True


def trades_attack(forward: Forward, x: Tensor, y: Tensor, attack: AttackConfig, draws: BatchDraws) -> Tensor:
    """x' that maximises KL(f(x) || f(x')) from x + 0.001 * normal noise (Zhang et al. 2019)."""
    with torch.no_grad():
        reference = full(forward(x)[0]).log_softmax(dim=1)
    settings = Pgd(attack.epsilon, attack.step, attack.num_steps, start="normal")
    return pgd(lambda z: forward(z)[0], x, reference, settings, draws, kl_divergence)


def trades(forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Outcome:
    """CE(f(x), y) + beta * KL(f(x) || f(x')), clean and adversarial images in passes of their own."""
    clean, routings = forward(x)
    robust, robust_routings = forward(x_adv)
    divergence = kl_divergence(robust, full(clean).log_softmax(dim=1)).mean()
    return Outcome(F.cross_entropy(full(clean), y) + beta * divergence, clean, robust, routings, robust_routings)


def pgd_at_attack(forward: Forward, x: Tensor, y: Tensor, attack: AttackConfig, draws: BatchDraws) -> Tensor:
    """x' that maximises CE(f(x'), y) from a uniform start (Madry et al. 2018)."""
    settings = Pgd(attack.epsilon, attack.step, attack.num_steps)
    return pgd(lambda z: forward(z)[0], x, y, settings, draws)


def pgd_at(forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Outcome:
    """CE(f(x'), y)."""
    robust, routings = forward(x_adv)
    return Outcome(F.cross_entropy(full(robust), y), None, robust, routings, routings)


def clean(forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Outcome:
    """CE(f(x), y)."""
    logits, routings = forward(x)
    return Outcome(F.cross_entropy(full(logits), y), logits, None, routings)


LOSSES = {
    "trades": Loss(trades_attack, trades),
    "pgd_at": Loss(pgd_at_attack, pgd_at, has_clean=False),
    "clean": Loss(None, clean),
}
