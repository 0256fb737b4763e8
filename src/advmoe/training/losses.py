"""The losses, each with the attack that finds its adversarial images.

f(x) are the logits of images x, and p(x) their softmax, the probabilities of the classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks import BatchDraws, Pgd, full, kl_divergence, pgd
from advmoe.config import AttackConfig, TrainingConfig
from advmoe.entries import Entries, check_accepts, check_kind
from advmoe.errors import UserError, lookup
from advmoe.moe import Routings

SMALLEST = 1e-12  # a probability whose logarithm is taken

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

    The attack gets labels [B] (RSLAD's: class probabilities [B, classes]); the value gets labels or class probabilities.
    `has_clean` says whether the value runs a forward pass of x as well as one of x'.
    """

    attack: Callable[[Forward, Tensor, Tensor, AttackConfig, BatchDraws], Tensor] | None
    value: Callable[[Forward, Tensor, Tensor, Tensor, float], Outcome]
    has_clean: bool = True


def trades_attack(forward: Forward, x: Tensor, y: Tensor, attack: AttackConfig, draws: BatchDraws) -> Tensor:
    """x' that maximises KL(p(x) || p(x')) from x + 0.001 * normal noise (Zhang et al. 2019)."""
    with torch.no_grad():
        reference = full(forward(x)[0]).log_softmax(dim=1)
    settings = Pgd(attack.epsilon, attack.step, attack.num_steps, start="normal")
    return pgd(lambda z: forward(z)[0], x, reference, settings, draws, kl_divergence)


def trades(forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Outcome:
    """CE(f(x), y) + beta * KL(p(x) || p(x')), with separate passes for clean and adversarial images (Zhang et al. 2019)."""
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


def rslad_attack(forward: Forward, x: Tensor, targets: Tensor, attack: AttackConfig, draws: BatchDraws) -> Tensor:
    """x' that maximises KL(t || p(x')) from x + 0.001 * normal noise; `targets` t [B, classes] are probabilities."""
    settings = Pgd(attack.epsilon, attack.step, attack.num_steps, start="normal")
    return pgd(lambda z: forward(z)[0], x, _log(targets), settings, draws, kl_divergence)


def rslad(forward: Forward, x: Tensor, x_adv: Tensor, targets: Tensor, beta: float) -> Outcome:
    """(KL(t || p(x)) + beta * KL(t || p(x'))) / (1 + beta), where `targets` t [B, classes] are a robust teacher's probabilities.

    Source: Zi, Zhao, Ma and Jiang, "Revisiting adversarial robustness distillation" (RSLAD), ICCV 2021, equation 6. Its weights
    1/6 and 5/6 are those of beta 5.
    """
    clean, routings = forward(x)
    robust, robust_routings = forward(x_adv)
    near, far = (kl_divergence(logits, _log(targets)).mean() for logits in (clean, robust))
    return Outcome((near + beta * far) / (1 + beta), clean, robust, routings, robust_routings)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=SMALLEST).log()


def clean(forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Outcome:
    """CE(f(x), y)."""
    logits, routings = forward(x)
    return Outcome(F.cross_entropy(full(logits), y), logits, None, routings)


RSLAD = Loss(rslad_attack, rslad)  # of a run with a teacher, whose loss is trades
LOSSES = Entries(
    {
        "trades": Loss(trades_attack, trades),
        "pgd_at": Loss(pgd_at_attack, pgd_at, has_clean=False),
        "clean": Loss(None, clean),
    }
)


def lookup_loss(name: str) -> Loss:
    """The entry of LOSSES. Raises UserError if there is none, or if a user's entry is not a Loss with the functions of one."""
    loss, what = lookup(LOSSES, name, "loss"), f"loss '{name}'"
    check_kind(what, loss, Loss)
    if loss.attack is not None:
        check_accepts(f"{what}: attack", loss.attack, "forward", "x", "y", "settings", "draws")
    check_accepts(f"{what}: value", loss.value, "forward", "x", "x_adv", "y", "beta")
    return loss


def check_outcome(outcome: Outcome, training: TrainingConfig, shape: tuple[int, int]) -> None:
    """Raises UserError if the value of a loss is not an Outcome whose total is one number, has logits of another `shape` (images,
    classes), or lacks what an option needs of x'."""
    check_kind("the result of the loss", outcome, Outcome)
    check_kind("the total of the loss", outcome.total, Tensor)
    if outcome.total.ndim:
        raise UserError(f"the total of the loss must be one number, a tensor of shape [], not {list(outcome.total.shape)}")
    for name in ("clean", "robust"):
        logits = getattr(outcome, name)
        if logits is not None and (not isinstance(logits, Tensor) or logits.shape != shape):
            actual = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{name} in the result of the loss must be logits of the shape {list(shape)}, not {actual}")
    options = [name for name in ("router_consistency", "router_margin", "runner_up_consistency") if getattr(training, name)]
    options += ["router_target"] if training.router_target != "none" else []
    if options and outcome.routings and (outcome.robust is None or not outcome.robust_routings):
        raise UserError(f"{options[0]} needs a loss whose Outcome has robust and robust_routings, the logits and routings of x'")
