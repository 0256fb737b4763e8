"""What it takes to fool a network on one image: which attack first does, how small a change suffices, a file that keeps it.

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
from advmoe.attacks.registry import ATTACKS
from advmoe.attacks.surrogate import Routed
from advmoe.evaluation.shards import SLACK
from advmoe.files import drafted

THOROUGH = ("pgd_50", "apgd_ce", "apgd_dlr", "apgd_t", "straight_through_1", "reroute")
QUICK = ("pgd_50", "apgd_ce", "reroute_quick")  # what a bisection asks at every epsilon, after what fooled before
CLOSE = 1 / 16  # a bisection ends where what was withstood is nearer than this share to what fooled,
ROUNDS = 12  # or after so many
Told = Callable[[str, float, bool], None]  # an attack's name, its epsilon, whether it fooled


@dataclass(frozen=True)
class Victim:
    """A frozen network and the image x [C, H, W] that it takes for class number `label`, of `num_classes`.

    `search` may be a faster twin of `network` for attacks to climb with; `network` alone decides what fools.
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
        """Whether the network takes x' [C, H, W] for another class; logits that are not finite are no answer."""
        logits = self.network(x_adv[None])[0]
        return bool(torch.isfinite(logits).all()) and int(logits.argmax()) != self.label


@dataclass(frozen=True)
class Fooled:
    """x' [C, H, W] that fools, the attack that found it, and its greatest change of a pixel."""

    x_adv: Tensor
    attack: str
    epsilon: float


def first_to_fool(victim: Victim, epsilon: float, told: Told, attacks: Sequence[str]) -> Fooled | None:
    """The first of the attacks, those without sense for this network left out, that fools it inside the ball of `epsilon`."""
    for name in attacks:
        if ATTACKS[name].obstacle(victim.setting):
            continue
        x_adv = _attacked(victim, name, epsilon)
        change = float((x_adv - victim.x).abs().max())
        fooled = change <= epsilon + SLACK and victim.is_fooled(x_adv)
        told(name, epsilon, fooled)
        if fooled:
            return Fooled(x_adv, name, change)
    return None


def _attacked(victim: Victim, name: str, epsilon: float) -> Tensor:
    label = torch.tensor([victim.label], device=victim.x.device)
    job = Job(victim.search, victim.x[None], label, [0], epsilon, "Linf", victim.seed, 0, victim.num_classes)
    return ATTACKS[name].run(job).detach()[0]


def beyond(victim: Victim, withstood: float, told: Told) -> tuple[Fooled | None, float]:
    """What fools at twice the epsilon `withstood`, or four times, and so on up to 1; and the last that was withstood."""
    while withstood < 1:
        found = first_to_fool(victim, min(2 * withstood, 1.0), told, QUICK)
        if found is not None:
            return found, withstood
        withstood = min(2 * withstood, 1.0)
    return None, withstood


def smallest(victim: Victim, found: Fooled, withstood: float, told: Told) -> Fooled:
    """A bisection between what was withstood and what fools. Attacks search, so that still less may suffice: an upper bound."""
    for _ in range(ROUNDS):
        if found.epsilon - withstood <= CLOSE * found.epsilon:
            break
        middle = (withstood + found.epsilon) / 2
        less = first_to_fool(victim, middle, told, tuple(dict.fromkeys((found.attack, *QUICK))))
        withstood, found = (middle, found) if less is None else (withstood, less)
    return found


def in_eight_bits(victim: Victim, found: Fooled, epsilon: float) -> Tensor | None:
    """x' on the 256 levels of a PNG, inside the ball of `epsilon` and still fooling; None where it is not to be had so."""
    low, high = ((255 * (victim.x.double() + side * epsilon)) for side in (-1, 1))
    low, high = (low - 255 * SLACK).ceil().clamp(min=0), (high + 255 * SLACK).floor().clamp(max=255)
    levels = torch.minimum(torch.maximum((255 * found.x_adv.double()).round(), low), high)
    x_adv = levels.float() / 255  # as a PNG's pixels are read
    return x_adv if bool((low <= high).all()) and victim.is_fooled(x_adv) else None


def write_image(x_adv: Tensor, path: Path) -> None:
    """An image [C, H, W] without loss: an 8-bit PNG of one whose pixels are 255ths, else (`path` ends in .npy) a float32 array."""
    pixels = x_adv.cpu().numpy()
    with drafted(path) as draft, draft.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, pixels)
        else:
            levels = (255 * pixels).round().astype(np.uint8)
            Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(file, "PNG")
