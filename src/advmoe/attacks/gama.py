"""GAMA-PGD: an ascent on the probability margin. In the first steps the distance from the clean probabilities is added.

Sriramanan et al. 2020 (Guided Adversarial Attack for Evaluating and Enhancing Adversarial Defenses), Algorithm 1.
"""

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import Objective, full, predicted, probability_margin
from advmoe.attacks.pgd import Predict, forward_backward

GUIDANCE = 50.0  # weight of the squared distance; it falls linearly to 0
GUIDED = 0.25  # fraction of the steps over which it falls
DROPS = (0.6, 0.85)  # fractions of the steps after which the step size is divided by 10


@torch.no_grad()
def gama(predict: Predict, x: Tensor, y: Tensor, epsilon: float, num_steps: int, draws: Draws) -> Tensor:
    """x' [B, C, H, W] in the L-infinity ball of `epsilon` around x: an image's first misclassified point, or its last point.

    The loss is max_{j != y} p_j(x') - p_y(x') + w * |p(x') - p(x)|^2, where w falls from 50 to 0. The ascent starts at a random
    corner of the ball. The step size is 2 * epsilon, then a tenth, then a hundredth of that.
    """
    clean = full(predict(x)).softmax(dim=1)
    x_adv = project(x + epsilon * draws.uniform(x).sign(), x, epsilon)
    rows = torch.arange(len(x), device=x.device)
    for number in range(num_steps):
        weight = GUIDANCE * max(0.0, 1 - number / (GUIDED * num_steps))
        step = 2 * epsilon * 0.1 ** sum(number >= drop * num_steps for drop in DROPS)
        logits, _, gradient = forward_backward(predict, x_adv[rows], y[rows], _guided(clean[rows], weight))
        correct = predicted(logits) == y[rows]
        rows, gradient = rows[correct], gradient[correct]
        if not len(rows):
            break
        x_adv[rows] = project(x_adv[rows] + step * gradient.sign(), x[rows], epsilon)
    return x_adv


def _guided(clean: Tensor, weight: float) -> Objective:
    """The probability margin plus `weight` times the squared distance from the probabilities `clean` [B, classes]."""

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        distance = (full(logits).softmax(dim=1) - clean).square().sum(dim=1)
        return probability_margin(logits, labels) + weight * distance

    return objective
