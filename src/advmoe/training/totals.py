"""The sums of an epoch's metrics, over iterations and ranks."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from advmoe import distributed
from advmoe.errors import UserError
from advmoe.training.groups import MATRIX
from advmoe.training.manifest import Partial
from advmoe.training.steps import Metrics

DIMENSIONS = {"load": 2, "router_entropy": 1, MATRIX: 2}  # of metrics that are not one number
Value = float | list[int] | list[float] | list[list[float]] | list[list[int]] | str  # the type of an epoch's figures


def check_metrics(metrics: object, method: str) -> None:
    """Raises UserError if the step of a user's method returns anything else than Metrics with a loss."""
    what = f"method '{method}': its step must return a dict of tensors"
    if not isinstance(metrics, dict) or "loss" not in metrics:
        content = f"a dict of {', '.join(map(str, metrics)) or 'nothing'}" if isinstance(metrics, dict) else type(metrics).__name__
        raise UserError(f"{what} with 'loss', not {content}")
    for name, value in metrics.items():
        dimensions = DIMENSIONS.get(name, 0)
        if not isinstance(value, Tensor) or value.ndim != dimensions:
            actual = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            expected = "one number, the sum over the images" if dimensions == 0 else f"of {dimensions} dimensions"
            raise UserError(f"{what}: '{name}' must be {expected}, not {actual}")


class Totals:
    """An epoch so far: iterations, images, seconds, and the sums of this rank's metrics."""

    def __init__(self, iteration: int = 0, images: int = 0, seconds: float = 0.0, sums: Metrics | None = None) -> None:
        self.iteration, self.images, self.sums = iteration, images, dict(sums or {})
        self._earlier_seconds, self._started = seconds, time.perf_counter()
        self._saved = self._started

    @classmethod
    def resumed(cls, partial: Partial | None) -> "Totals":
        """The totals in a checkpoint; zeros if there is none.

        Each rank continues with its sums. If the number of ranks has changed, rank 0 continues with the sums of all ranks.
        """
        if partial is None:
            return cls()
        same_ranks = len(partial.images) == distributed.world_size()

        def of_rank(by_rank: Any) -> Tensor:
            values = torch.tensor(by_rank)
            return values[distributed.rank()] if same_ranks else values.sum(dim=0) * (distributed.rank() == 0)

        sums = {name: of_rank(values) for name, values in partial.sums.items()}
        return cls(partial.iteration, int(of_rank(partial.images)), partial.seconds, sums)

    @property
    def seconds(self) -> float:
        """Wall time of the iterations."""
        return self._earlier_seconds + time.perf_counter() - self._started

    @property
    def seconds_unsaved(self) -> float:
        """Wall time since the last checkpoint, or since the start."""
        return time.perf_counter() - self._saved

    def add(self, metrics: Metrics, images: int) -> None:
        """Count an iteration over `images` images."""
        for name, value in metrics.items():  # iterations in which routers do not learn have no router metrics
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)).to(value.device) + value
        self.iteration, self.images = self.iteration + 1, self.images + images

    def over_ranks(self) -> tuple[Metrics, int]:
        """The sums and the number of images over all ranks."""
        images = int(distributed.sum_over_ranks(self._images()))
        return {name: distributed.sum_over_ranks(value) for name, value in self.sums.items()}, images

    def partial(self, digests: Mapping[str, str]) -> Partial:
        """The totals and `digests` for a checkpoint, which counts as saved from now on."""
        images = distributed.all_gather(self._images())
        sums: dict[str, JsonValue] = {name: distributed.all_gather(value).tolist() for name, value in self.sums.items()}
        self._saved = time.perf_counter()
        return Partial(iteration=self.iteration, images=images.tolist(), seconds=self.seconds, sums=sums, digests=dict(digests))

    def _images(self) -> torch.Tensor:
        return next(iter(self.sums.values())).new_tensor(self.images, dtype=torch.int64)


def image_count(name: str, sums: Metrics, images: int) -> torch.Tensor | int:
    """The number of images that the sum `name` is over: `images`, or less for router_loss, because routers may rest."""
    return sums.get("router_images", images) if name == "router_loss" else images


def means(sums: Metrics, images: int) -> dict[str, Value]:
    """Sums over images as an epoch's figures.

    Losses become means per image, counts of correct answers percentages, `load` each expert's share; `dead` lists each layer's
    experts without images. Counts of confusions stay counts.
    """
    row: dict[str, Value] = {}
    for name, value in sums.items():
        if name == "router_images":
            continue
        if name == MATRIX:
            row[name] = value.tolist()
        elif name == "load":
            row["load"] = (value / value.sum(dim=1, keepdim=True)).tolist()
            row["dead"] = [(counts == 0).nonzero()[:, 0].tolist() for counts in value]
        elif name == "router_entropy":
            row[name] = (value / images).tolist()
        elif name.endswith("_correct"):
            row[f"train_{name.removesuffix('_correct')}"] = 100 * value.item() / images
        else:
            row[name] = (value / image_count(name, sums, images)).item()
    return row
