"""The robust accuracy of exported files, on stand-ins."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from advmoe.benchmark.suites import low_precision
from advmoe.benchmark.suites.low_precision import Case, Deployed, robust_accuracy


def predict(x):
    """Two classes: an image of one pixel above 0.5 is of class 1. There are no routes."""
    pixel = x.flatten(1)[:, 0]
    return torch.stack([1 - pixel, pixel], dim=1), None


def test_logits_are_those_of_the_file_and_gradients_those_of_the_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    x = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).requires_grad_()
    logits = Deployed(predict, network)(x)
    assert torch.allclose(logits, predict(x)[0])
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert torch.allclose(gradient.flatten(), network[1].weight[0, 0].expand(2))


def test_an_image_that_either_attack_broke_counts_as_broken_by_both(monkeypatch):
    monkeypatch.setattr(low_precision, "fused", lambda network: network)
    monkeypatch.setattr(Case, "evaluated", lambda case, network: SimpleNamespace(ever=[2]))
    case = Case(SimpleNamespace(network=nn.Flatten()), torch.tensor([0.1, 0.2, 0.3, 0.9]).view(4, 1, 1, 1), torch.zeros(4), None)
    adversarial = [(torch.tensor([0, 1]), torch.tensor([0.4, 0.6]).view(2, 1, 1, 1))]
    figures = robust_accuracy(case, predict, "int8", adversarial)  # image 3 is wrong without an attack
    assert figures == {"RA: transferred": 50.0, "RA: attacked itself": 50.0, "RA: both": pytest.approx(25.0)}
