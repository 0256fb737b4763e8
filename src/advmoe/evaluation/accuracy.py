"""Clean and robust accuracy of any network that maps pixels in [0, 1] to logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.attacks import ImageDraws, Pgd, frozen, pgd
from advmoe.data import Source


@torch.inference_mode()
def predict_all(model: nn.Module, images: Source, batch_size: int = 256) -> Tensor:
    """Predicted classes [n], in eval mode, float32. An image with a logit that is not finite has the class -1."""
    with frozen(model):
        parts = [
            _classes(model(batch.pixels()))
            for start in range(0, len(images), batch_size)
            for batch in [images[torch.arange(start, min(start + batch_size, len(images)), device=images.labels.device)]]
        ]
    return torch.cat(parts)


def _classes(logits: Tensor) -> Tensor:
    """The predicted classes. The argmax of NaN would be a class, and could be the label."""
    return logits.argmax(dim=1).where(torch.isfinite(logits).all(dim=1), -1)


def correct_flags(model: nn.Module, images: Source) -> Tensor:
    """Which images are classified correctly: [n] bool."""
    return predict_all(model, images) == images.labels


def robust_flags(
    model: nn.Module, images: Source, settings: Pgd, *, correct: Tensor | None = None, numbers: Sequence[int] | None = None,
    batch_size: int = 128,
) -> Tensor:  # fmt: skip
    """Which images are classified correctly under PGD on cross-entropy: [n] bool.

    Only correctly classified images are attacked. Pass `correct` [n] bool if they are known already. The noise of an image
    depends on its entry in `numbers` (by default its row), so the result does not depend on the batch size.
    """
    flags = correct_flags(model, images) if correct is None else correct.clone()
    rows = flags.nonzero()[:, 0]
    for chunk in rows.split(batch_size):
        batch = images[chunk]
        noise_numbers = chunk.tolist() if numbers is None else [numbers[row] for row in chunk.tolist()]
        x_adv = adversarial(model, batch.pixels(), batch.labels, settings, noise_numbers)
        with torch.inference_mode(), frozen(model):
            flags[chunk] = _classes(model(x_adv)) == batch.labels
    return flags


def adversarial(model: nn.Module, x: Tensor, y: Tensor, settings: Pgd, images: list[int], seed: int = 0) -> Tensor:
    """PGD on cross-entropy: x [B, C, H, W], y [B] -> x' [B, C, H, W]. The noise of a row depends on its number in `images`."""
    with frozen(model):
        return pgd(model, x, y, settings, ImageDraws(seed, images))


def accuracy(flags: Tensor) -> float:
    """The percentage of true flags."""
    return 100 * flags.float().mean().item()
