"""The exponential moving average of a network."""

import torch
from torch import nn

from advmoe.models import Classifier
from advmoe.moe.copies import copied

WARM_START = 10


class Ema:
    """theta_ema <- d theta_ema + (1 - d) theta after every iteration, with d = min(decay, (1 + t) / (10 + t)) at update t (from 0).

    All parameters are averaged, the routers' too, and so are the running statistics of norms and routers. Counts of batches that
    are floats (those of routers and expert norms) are averaged too; integers are copied.
    Source: weight averaging as in Gowal et al. 2020 ("Uncovering the limits of adversarial training"); the warm start is that of
    TensorFlow's ExponentialMovingAverage. The running statistics are averaged, not recomputed on the training images, because that
    would cost passes over the images before each validation. The averages are close to the statistics of the last 1 / (1 - d)
    iterations.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model, self.decay, self.updates = copied(model).eval(), decay, 0
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model`."""
        decay = min(self.decay, (1 + self.updates) / (WARM_START + self.updates))
        self.updates += 1
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
