"""The set of allowed images: the intersection of an L-infinity or L2 ball and [0, 1].

Images are [B, C, H, W] with pixels in [0, 1]; distances are in the same unit.
"""

from math import prod
from typing import SupportsIndex, get_args

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.config.choices import Norm
from advmoe.errors import UserError, check_count, nearest


def check_norm(norm: str) -> None:
    """Raises UserError if `norm` is not one of `Norm`. Without this check any other name would mean L-infinity."""
    if norm not in get_args(Norm):
        raise UserError(f"unknown norm '{norm}': {nearest(norm, list(get_args(Norm)))}")


def check_settings(epsilon: float, norm: str, num_steps: int, restarts: int) -> None:
    """Raises UserError if a setting of an attack is out of its range."""
    check_norm(norm)
    if not epsilon >= 0:
        raise UserError(f"epsilon must be at least 0, not {epsilon:g}")
    if not isinstance(num_steps, SupportsIndex) or num_steps < 0:
        raise UserError(f"num_steps must be a whole number of at least 0, not {num_steps}")
    check_count("restarts", restarts)


def project(x_adv: Tensor, x: Tensor, epsilon: float, norm: Norm = "Linf") -> Tensor:
    """Project x_adv onto the ball around x and onto [0, 1].

    Linf: the nearest allowed point. L2: the change is scaled down to the radius, then the pixels are clamped. `x` is in [0, 1],
    so clamping moves a point closer to x and never out of the ball. Raises UserError on an unknown norm.
    """
    if norm == "L2":
        change = x_adv - x
        return (x + change * (epsilon / length(change).clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)
    if norm != "Linf":
        check_norm(norm)
    return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp_(0, 1)


def ascent(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of steepest ascent, of length 1: the gradient's sign (Linf), or the gradient divided by its L2 norm (L2).

    A zero gradient stays zero. In L2, entries that are not finite count as zero: divided by them, all others would be lost.
    """
    if norm == "L2":
        gradient = gradient.nan_to_num(0, 0, 0)
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / torch.where(largest > 0, largest, 1)  # the squares of a tiny gradient would underflow
        return scaled / length(scaled).clamp_min(1)  # the largest entry is 1, so the norm is at least 1
    return gradient.sign()


def uniform_start(x: Tensor, epsilon: float, norm: Norm, draws: Draws) -> Tensor:
    """A point drawn uniformly from the ball around x, not yet clamped to [0, 1].

    L2: the direction of a Gaussian sample times epsilon * u^(1/d), with u uniform in [0, 1] and d = C*H*W.
    """
    if norm == "L2":
        direction = draws.normal(x)
        radius = epsilon * ((draws.uniform(x[:, :1, :1, :1]) + 1) / 2) ** (1 / prod(x.shape[1:]))
        return x + radius * direction / length(direction).clamp_min(1e-12)
    return x + epsilon * draws.uniform(x)


def length(change: Tensor) -> Tensor:
    """L2 norm of each image's change: [B, C, H, W] -> [B, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return norm
