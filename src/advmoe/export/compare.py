"""Compare the outputs of an exported file with those of the network.

Shapes: B images, N experts, L layers that choose (1 if one router serves all).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.attacks.surrogate import undecided
from advmoe.models import Classifier

BATCHES = (1, 7, 64)
TOLERANCE, RELATIVE = 1e-4, 1e-5  # of a logit: absolute, and relative to the image's largest logit
Predictor = Callable[[Tensor], tuple[Tensor, ...]]  # pixels [B, C, H, W] -> logits [B, classes] and, if routed, routes [B, L]


@dataclass(frozen=True)
class Comparison:
    """The differences between the file and the network on the same images, run in batches of size `batch`."""

    batch: int
    images: int
    differing: tuple[int, ...]
    """Rows with a different class or route, or with a logit that differs by more than the tolerance; without `undecided` rows."""
    undecided: tuple[int, ...]
    """Rows whose route rounding may decide (`advmoe.attacks.surrogate.undecided`). They are not compared."""
    largest: float
    """The largest difference between logits in the compared rows."""

    @property
    def compared(self) -> int:
        """The number of compared images."""
        return self.images - len(self.undecided)

    @property
    def equal(self) -> bool:
        """Whether images were compared, and none differs."""
        return self.compared > 0 and not self.differing


@dataclass(frozen=True)
class Agreement:
    """How often a file of lower precision agrees with PyTorch in float32 on the same images, in percent.

    The images are run in batches of size `batch`.
    """

    batch: int
    images: int
    classes: float
    """Percentage of images with the same predicted class."""
    routes: float | None
    """Percentage of images with the same expert in every layer. None without experts."""
    accuracy: float | None
    """Accuracy of the file minus that of PyTorch, in percentage points. None without labels."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """A network's outputs for B images: `logits` [B, classes], `routes` [B, L], and which routes are `undecided` [B]."""

    logits: Tensor
    routes: Tensor
    undecided: Tensor


@torch.inference_mode()
def outputs(model: Classifier, pixels: Tensor) -> Outputs:
    """The outputs of `model`, which is in eval mode on the CPU, for `pixels` [B, C, H, W]."""
    parts = [_network_outputs(model, chunk) for chunk in pixels.split(BATCHES[-1])]
    return Outputs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def compare(reference: Outputs, predict: Predictor, pixels: Tensor, batch: int) -> Comparison:
    """Compare `predict` on `pixels` [n, C, H, W], in batches of size `batch`, with the outputs `reference` of the network."""
    logits, *routes = _predict_batches(predict, pixels, batch)
    difference = (logits - reference.logits).abs().amax(dim=1)
    allowed = TOLERANCE + RELATIVE * reference.logits.abs().amax(dim=1)
    differs = ~(difference <= allowed) | (logits.argmax(dim=1) != reference.logits.argmax(dim=1))
    if reference.routes.shape[1]:
        differs |= (routes[0] != reference.routes).any(dim=1)
    compared = ~reference.undecided
    largest = difference[compared].max().item() if compared.any() else 0.0
    return Comparison(batch, len(pixels), _rows(differs & compared), _rows(reference.undecided), largest)


def agreement(reference: Outputs, predict: Predictor, pixels: Tensor, labels: Tensor | None, batch: int) -> Agreement:
    """Compare `predict`, of lower precision, on `pixels` [n, C, H, W] with the outputs `reference` of the network.

    `labels` [n] int64, or None. `predict` gets batches of size `batch`.
    """
    logits, *routes = _predict_batches(predict, pixels, batch)
    predicted, expected = logits.argmax(dim=1), reference.logits.argmax(dim=1)
    accuracy = None if labels is None else _percent(predicted == labels) - _percent(expected == labels)
    same = _percent((routes[0] == reference.routes).all(dim=1)) if reference.routes.shape[1] else None
    return Agreement(batch, len(pixels), _percent(predicted == expected), same, accuracy)


def _predict_batches(predict: Predictor, pixels: Tensor, batch: int) -> list[Tensor]:
    """The outputs of `predict` for all images: logits and, if routed, routes. It runs `batch` images at a time."""
    parts = [predict(chunk) for chunk in pixels.split(batch)]
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _network_outputs(model: Classifier, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, routings = model.forward_routed(pixels)
    if not routings:
        return logits, torch.empty(len(pixels), 0, dtype=torch.int64), torch.zeros(len(pixels), dtype=torch.bool)
    return logits, torch.stack([routing.experts for routing in routings], dim=1), undecided(routings)


def _rows(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero()[:, 0].tolist())
