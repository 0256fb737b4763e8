import torch
from torch import nn

from advmoe.config import TrainingConfig
from advmoe.training.start import _optimizer


def after_three_steps(fused):
    """Two parameters, of which the second has no gradient in the first step."""
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = _optimizer([{"params": parameters}], TrainingConfig(lr=0.1), fused)
    for number in range(3):
        for parameter in parameters[: number + 1]:
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        optimizer.step()
    return torch.stack([parameter.detach() for parameter in parameters])


def test_a_fused_optimizer_takes_a_late_first_gradient_and_the_same_steps() -> None:
    torch.testing.assert_close(after_three_steps(fused=True), after_three_steps(fused=None))
