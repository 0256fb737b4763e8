"""The independent attack on networks whose robust images are known."""

import pytest
import torch
from torch import Tensor, nn

from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites import SUITES, independent
from advmoe.errors import UserError


class Margins(nn.Module):
    """Logits of images [B, 1, 1, 1]: class 0 leads class 2 by x - 0.4, and class 1 by 10."""

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1)[:, 0] - 0.4
        return torch.stack([lead, lead - 10, torch.zeros_like(lead)], dim=1)


def test_exactly_the_images_within_epsilon_of_a_boundary_are_broken():
    x = torch.tensor([0.41, 0.49, 0.51, 0.9])[:, None, None, None]
    labels = torch.zeros(4, dtype=torch.long)
    assert independent.broken(Margins(), x, labels, epsilon=0.1).tolist() == [True, True, False, False]
    assert independent.broken(Margins(), x[:0], labels[:0], epsilon=0.1).tolist() == []


def test_every_wrong_class_is_attacked():
    """At x = 0.5, class 1 has a higher logit but cannot be reached; class 2 can."""

    class Twisted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.flatten(1).unbind(dim=1)
            return torch.stack([torch.zeros_like(a), -0.06 + 0.5 * (a - 0.5), -0.09 + (b - 0.5)], dim=1)

    x = torch.full((1, 1, 1, 2), 0.5)
    assert independent.broken(Twisted(), x, torch.zeros(1, dtype=torch.long), epsilon=0.1).tolist() == [True]


def test_the_suite_needs_runs():
    with pytest.raises(UserError, match="give --runs RUN"):
        SUITES["independent"].check(Setup())
