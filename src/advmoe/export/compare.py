"""Does an exported network say what the network says?

Shapes: B images, N experts, L choices of a route.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.models import Classifier
from advmoe.moe import Routings

BATCHES = (1, 7, 64)
TOLERANCE, RELATIVE = 1e-4, 1e-5  # of a logit: absolute, and relative to the image's largest logit
MARGIN = 1e-5  # between a router's first two logits, relative to the first where that is above 1: below it rounding decides
Predictor = Callable[[Tensor], tuple[Tensor, ...]]  # pixels [B, C, H, W] -> logits [B, classes] and, if routed, routes [B, L]


@dataclass(frozen=True)
class Comparison:
    """What came of running the same images through both, `batch` at a time."""

    batch: int
    images: int
    differing: tuple[int, ...]
    """Rows whose class or route differs, or a logit by more than the tolerance, although every router was decided."""
    undecided: tuple[int, ...]
    """Rows with a router margin under MARGIN: listed, not compared."""
    largest: float
    """The largest difference of a logit in the rows that were compared."""

    @property
    def equal(self) -> bool:
        return not self.differing


@dataclass(frozen=True)
class Agreement:
    """How far a file of lower precision says what PyTorch says in float32 of the same images, `batch` at a time; percent."""

    batch: int
    images: int
    classes: float
    """Images taken for the same class."""
    routes: float | None
    """Images sent the same way in all layers; None without experts."""
    accuracy: float | None
    """Accuracy of the file minus PyTorch's, in percentage points; None without labels."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network says of B images: `logits` [B, classes], `routes` [B, L], and the least router `margins` [B]."""

    logits: Tensor
    routes: Tensor
    margins: Tensor


@torch.inference_mode()
def answers(model: Classifier, pixels: Tensor) -> Answers:
    """The network's own, in eval mode on the CPU."""
    parts = [_answered(model, chunk) for chunk in pixels.split(BATCHES[-1])]
    return Answers(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def compare(known: Answers, predict: Predictor, pixels: Tensor, batch: int) -> Comparison:
    """Compare `predict`, given `batch` images at a time, with what is known of `pixels` [n, C, H, W]."""
    logits, *routes = _said(predict, pixels, batch)
    off = (logits - known.logits).abs().amax(dim=1)
    allowed = TOLERANCE + RELATIVE * known.logits.abs().amax(dim=1)
    differs = ~(off <= allowed) | (logits.argmax(dim=1) != known.logits.argmax(dim=1))
    if known.routes.shape[1]:
        differs |= (routes[0] != known.routes).any(dim=1)
    undecided = known.margins < MARGIN
    largest = off[~undecided].max().item() if not undecided.all() else 0.0
    return Comparison(batch, len(pixels), _rows(differs & ~undecided), _rows(undecided), largest)


def agreement(known: Answers, predict: Predictor, pixels: Tensor, labels: Tensor | None, batch: int) -> Agreement:
    """Compare `predict`, of a lower precision, with what is known of `pixels` [n, C, H, W] with `labels` [n]."""
    logits, *routes = _said(predict, pixels, batch)
    found, expected = logits.argmax(dim=1), known.logits.argmax(dim=1)
    accuracy = None if labels is None else _percent(found == labels) - _percent(expected == labels)
    same = _percent((routes[0] == known.routes).all(dim=1)) if known.routes.shape[1] else None
    return Agreement(batch, len(pixels), _percent(found == expected), same, accuracy)


def _said(predict: Predictor, pixels: Tensor, batch: int) -> list[Tensor]:
    """Logits and, if routed, routes of all images, given `batch` at a time."""
    found = [predict(chunk) for chunk in pixels.split(batch)]
    return [torch.cat(columns) for columns in zip(*found, strict=True)]


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _answered(model: Classifier, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, routings = model.forward_routed(pixels)
    if not routings:
        return logits, torch.empty(len(pixels), 0, dtype=torch.int64), torch.full((len(pixels),), torch.inf)
    return logits, torch.stack([routing.experts for routing in routings], dim=1), _margins(routings)


def _margins(routings: Routings) -> Tensor:
    """[B], the least distance between a router's first two logits, relative to the first if that is above 1; inf for N = 1."""
    ordered = torch.stack([routing.logits.sort(dim=1, descending=True).values for routing in routings])  # [L, B, N]
    if ordered.shape[2] == 1:
        return torch.full((ordered.shape[1],), torch.inf)
    return ((ordered[..., 0] - ordered[..., 1]) / ordered[..., 0].abs().clamp(min=1)).amin(dim=0)


def _rows(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero()[:, 0].tolist())
