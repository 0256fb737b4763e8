"""Clean and robust accuracy of any network that maps pixels in [0, 1] to logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.attacks import ImageDraws, Pgd, frozen, pgd
from advmoe.attacks.objectives import predicted
from advmoe.data import Source


@torch.inference_mode()
def predict_all(model: nn.Module, images: Source, batch_size: int = 256) -> Tensor:
    """Predicted classes [n], in eval mode, float32. An image with a logit that is not finite has the class -1."""
    with frozen(model):
        parts = [
            predicted(model(batch.pixels()))
            for start in range(0, len(images), batch_size)
            for batch in [images[torch.arange(start, min(start + batch_size, len(images)), device=images.labels.device)]]
        ]
    return torch.cat(parts)


def correct_flags(model: nn.Module, images: Source) -> Tensor:
    """Which images are classified correctly: [n] bool."""
    return predict_all(model, images) == images.labels


def robust_flags(
    model: nn.Module, images: Source, settings: Pgd, *, correct: Tensor, numbers: Sequence[int], batch_size: int = 128
) -> Tensor:
    """Which images are classified correctly under PGD on cross-entropy: [n] bool.

    Only the images that are classified correctly without an attack, `correct` [n] bool, are attacked. The noise of an image depends
    on its entry in `numbers`, so the result does not depend on the batch size.
    """
    flags = correct.clone()
    for chunk in correct.nonzero()[:, 0].split(batch_size):
        batch = images[chunk]
        noise = ImageDraws(0, [numbers[row] for row in chunk.tolist()])
        with frozen(model):
            x_adv = pgd(model, batch.pixels(), batch.labels, settings, noise)
            with torch.inference_mode():
                flags[chunk] = predicted(model(x_adv)) == batch.labels
    return flags
