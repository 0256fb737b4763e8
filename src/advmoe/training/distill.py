"""A teacher: a trained network whose class probabilities are the targets of the loss (RSLAD)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.models import Classifier
from advmoe.training.precision import in_precision


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network in eval mode on the training device, and the digest of its weights.

    It computes in `autocast` if that is a dtype. `precomputed` [n, C] are its probabilities for all training images, or None if
    augmentation changes the images.
    """

    network: Classifier
    digest: str
    autocast: torch.dtype | None
    precomputed: Tensor | None = None

    @torch.no_grad()
    def probabilities(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, C] float32 for images x [B, C, H, W]; looked up if `rows`, their numbers in the training part, are known."""
        if self.precomputed is not None and rows is not None:
            return self.precomputed[rows]
        with in_precision(x.device, self.autocast):
            logits: Tensor = self.network(x)
        return logits.float().softmax(dim=1)
