"""Fool a network on one image: find the first attack that succeeds and the smallest sufficient epsilon, and write the image.

Shapes: C channels of H x W pixels in [0, 1]; distances are L-infinity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advmoe.attacks.job import Job, Setting
from advmoe.attacks.objectives import predicted
from advmoe.attacks.registry import ATTACKS, run_attack
from advmoe.attacks.surrogate import Routed
from advmoe.errors import UserError
from advmoe.evaluation.shards import SLACK
from advmoe.files import drafted

THOROUGH = ("pgd_50", "apgd_ce", "apgd_dlr", "apgd_t", "straight_through_1", "reroute")
QUICK = ("pgd_50", "apgd_ce", "reroute_quick")  # attacks of a bisection at every epsilon, after the last attack that succeeded
CLOSE = 1 / 16  # a bisection ends if its interval is at most this fraction of the smallest epsilon that fools,
ROUNDS = 12  # or after this many steps
OnAttempt = Callable[[str, float, bool], None]  # an attack's name, its epsilon, whether it fooled


@dataclass(frozen=True)
class Victim:
    """A frozen network, and the image x [C, H, W] that it classifies as class number `label` of `num_classes`.

    `search` may be a faster copy of `network`, which attacks use for gradients. Only `network` decides whether an image fools it.
    """

    network: Routed
    search: Routed
    x: Tensor
    label: int
    num_classes: int
    routed: bool
    seed: int = 0

    @property
    def setting(self) -> Setting:
        """What decides which attacks can run."""
        channels, height, width = self.x.shape
        return Setting("Linf", self.num_classes, (channels, height, width), self.routed, transfer=False)

    @torch.no_grad()
    def is_fooled(self, x_adv: Tensor) -> bool:
        """Whether the network predicts another class for x' [C, H, W]. Raises UserError if a logit is not finite."""
        prediction = int(predicted(self.network(x_adv[None])))
        if prediction < 0:
            raise UserError("the network gives logits that are not finite for a changed image, so it has no prediction there")
        return prediction != self.label


@dataclass(frozen=True)
class Fooled:
    """An image x' [C, H, W] that fools the network, the name of the attack, and the largest change of a pixel."""

    x_adv: Tensor
    attack: str
    epsilon: float


def first_to_fool(victim: Victim, epsilon: float, report: OnAttempt, attacks: Sequence[str]) -> Fooled | None:
    """The result of the first attack that fools inside the ball of `epsilon`, or None. Attacks that cannot run are skipped."""
    for name in attacks:
        if ATTACKS[name].obstacle(victim.setting):
            continue
        x_adv = _attacked(victim, name, epsilon)
        change = float((x_adv - victim.x).abs().max())
        fooled = change <= epsilon + SLACK and victim.is_fooled(x_adv)
        report(name, epsilon, fooled)
        if fooled:
            return Fooled(x_adv, name, change)
    return None


def _attacked(victim: Victim, name: str, epsilon: float) -> Tensor:
    label = torch.tensor([victim.label], device=victim.x.device)
    job = Job(victim.search, victim.x[None], label, [0], epsilon, "Linf", victim.seed, 0, victim.num_classes)
    return run_attack(name, job)[0]


def beyond(victim: Victim, withstood: float, report: OnAttempt) -> tuple[Fooled | None, float]:
    """Double the epsilon, from `withstood` up to 1, until an attack succeeds.

    Returns the result of that attack, or None, and the largest epsilon at which no attack succeeded.
    """
    while withstood < 1:
        best = first_to_fool(victim, min(2 * withstood, 1.0), report, QUICK)
        if best is not None:
            return best, withstood
        withstood = min(2 * withstood, 1.0)
    return None, withstood


def smallest(victim: Victim, best: Fooled, withstood: float, report: OnAttempt) -> Fooled:
    """Bisect between the epsilon `withstood` and the one of `best`. The result is an upper bound: a smaller change may exist."""
    for _ in range(ROUNDS):
        if best.epsilon - withstood <= CLOSE * best.epsilon:
            break
        middle = (withstood + best.epsilon) / 2
        less = first_to_fool(victim, middle, report, tuple(dict.fromkeys((best.attack, *QUICK))))
        withstood, best = (middle, best) if less is None else (withstood, less)
    return best


def in_eight_bits(victim: Victim, best: Fooled, epsilon: float) -> Tensor | None:
    """x' [C, H, W] rounded to the 256 levels of a PNG, inside the ball of `epsilon`; None if the rounded image does not fool."""
    low, high = ((255 * (victim.x.double() + side * epsilon)) for side in (-1, 1))
    low, high = (low - 255 * SLACK).ceil().clamp(min=0), (high + 255 * SLACK).floor().clamp(max=255)
    levels = torch.minimum(torch.maximum((255 * best.x_adv.double()).round(), low), high)
    x_adv = levels.float() / 255  # as a PNG's pixels are read
    return x_adv if bool((low <= high).all()) and victim.is_fooled(x_adv) else None


def write_image(x_adv: Tensor, path: Path) -> None:
    """Write an image [C, H, W] without loss: a float32 array if `path` ends in .npy, else an 8-bit PNG (pixels must be 255ths)."""
    pixels = x_adv.cpu().numpy()
    with drafted(path) as draft, draft.open("wb") as file:
        if path.suffix.lower() == ".npy":
            np.save(file, pixels)
        else:
            levels = (255 * pixels).round().astype(np.uint8)
            Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(file, "PNG")
