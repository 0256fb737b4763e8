"""Labels as class probabilities: smoothed, or mixed with the moving average's predictions."""

import math

import torch
from torch import Tensor

from advmoe.attacks import full

ADR_LAMBDA = (0.7, 0.95)  # at the start and at the end of the phase
ADR_TEMPERATURE = (2.5, 2.0)


def smoothed(labels: Tensor, share: float) -> Tensor:
    """Label smoothing: probabilities [B, classes] with `share` of them spread evenly over all classes (Szegedy et al. 2016, section
    7)."""
    return (1 - share) * labels + share / labels.shape[1]


def annealed(done: float, ends: tuple[float, float]) -> float:
    """A value that goes from the first of `ends` to the second along half a cosine, as `done` goes from 0 to 1."""
    start, end = ends
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def adr(labels: Tensor, y: Tensor, logits: Tensor, done: float) -> Tensor:
    """Annealed self-distillation (ADR, Wu, Wang and Chen, ICLR 2024): lambda_i p + (1 - lambda_i) `labels`, [B, classes].

    p is the softmax of the moving average's `logits` [B, classes] for x, divided by the temperature. lambda_i is lambda minus
    (max p - p_y), at least 0, so p counts less for images that the average misclassifies. `done` is the finished fraction of the
    phase.
    """
    p = (full(logits) / annealed(done, ADR_TEMPERATURE)).softmax(dim=1)
    gap = p.amax(dim=1) - p.gather(1, y[:, None])[:, 0]
    share = (annealed(done, ADR_LAMBDA) - gap).clamp(0, 1)[:, None]
    return share * p + (1 - share) * labels
