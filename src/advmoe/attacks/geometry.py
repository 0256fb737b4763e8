"""The ball that an attack may move in: L-infinity or L2, cut with [0, 1]. Images are [B, C, H, W], distances in pixels."""

from math import prod
from typing import get_args

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.config.choices import Norm
from advmoe.errors import UserError, nearest


def check_norm(norm: str) -> None:
    """Raise a UserError unless `norm` is one of `Norm`: any other name would silently be taken for L-infinity."""
    if norm not in get_args(Norm):
        raise UserError(f"unknown norm '{norm}': {nearest(norm, list(get_args(Norm)))}")


def project(x_adv: Tensor, x: Tensor, epsilon: float, norm: Norm = "Linf") -> Tensor:
    """Point of the ball around x and of [0, 1]: the nearest one for Linf; for L2, shortened to the radius, then clamped.

    `x` lies in [0, 1], so the clamp brings a point nearer to it and never out of the ball.
    """
    if norm == "L2":
        change = x_adv - x
        return (x + change * (epsilon / length(change).clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)
    return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp_(0, 1)


def ascent(gradient: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of length 1: the gradient's sign (Linf), or the gradient over its length (L2). A zero one stays zero."""
    if norm == "L2":
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / torch.where(largest > 0, largest, 1)  # squares of a saturated network's gradient would underflow
        return scaled / length(scaled).clamp_min(1)  # one entry is 1, so a gradient's length is at least that
    return gradient.sign()


def uniform_start(x: Tensor, epsilon: float, norm: Norm, draws: Draws) -> Tensor:
    """A point drawn uniformly from the ball around x (not yet cut with [0, 1]).

    L2: a Gaussian's direction times epsilon * u^(1/d), u uniform in [0, 1], d = C*H*W.
    """
    if norm == "L2":
        direction = draws.normal(x)
        radius = epsilon * ((draws.uniform(x[:, :1, :1, :1]) + 1) / 2) ** (1 / prod(x.shape[1:]))
        return x + radius * direction / length(direction).clamp_min(1e-12)
    return x + epsilon * draws.uniform(x)


def length(change: Tensor) -> Tensor:
    """L2 norm of each image's row: [B, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return norm
