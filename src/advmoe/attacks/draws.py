"""The sources of an attack's random numbers."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from advmoe import distributed
from advmoe.errors import UserError
from advmoe.wording import number_of


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers. If any of the numbers changes, so does the seed."""
    halves = [half for number in numbers for half in (number & 0xFFFFFFFF, number >> 32)]
    return int(np.random.SeedSequence([len(numbers), *halves]).generate_state(1, np.uint64)[0] >> 1)


class Draws(Protocol):
    """A source of noise shaped like a batch."""

    def uniform(self, x: Tensor) -> Tensor:
        """Uniform in [-1, 1], in the shape of x."""
        ...

    def normal(self, x: Tensor) -> Tensor:
        """Standard normal, in the shape of x."""
        ...

    def rows(self, index: Tensor) -> "Draws":
        """The source for only the images `index` [n] int64 of the batch. It shares its generators with this one."""
        ...


class BatchDraws:
    """Noise from one generator for a full batch, drawn on the device of the batch. It is fast, and used in training.

    If several ranks share a batch, set `batch` to the number of images on all ranks: each rank draws noise for all of them and
    keeps the rows of its images.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.batch: int | None = None
        self.index: Tensor | None = None

    def uniform(self, x: Tensor) -> Tensor:
        return self._local(self._empty(x).uniform_(-1, 1, generator=self.generator))

    def normal(self, x: Tensor) -> Tensor:
        return self._local(self._empty(x).normal_(generator=self.generator))

    def _empty(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if self.batch is None else x.new_empty(self.batch, *x.shape[1:])

    def _local(self, noise: Tensor) -> Tensor:
        if self.batch is None:
            return noise
        local = noise[distributed.local_rows(self.batch)]
        return local if self.index is None else local[self.index]

    def rows(self, index: Tensor) -> "BatchDraws":
        if self.batch is None:
            return self
        chosen = BatchDraws(self.generator)
        chosen.batch, chosen.index = self.batch, index if self.index is None else self.index[index]
        return chosen


class ImageDraws:
    """Noise from one generator per image. The noise of an image does not depend on the other images of its batch.

    Raises UserError if a batch has another number of images.
    """

    def __init__(self, seed: int, images: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, image)) for image in images]

    def uniform(self, x: Tensor) -> Tensor:
        return self._rows(x, lambda row, generator: row.uniform_(-1, 1, generator=generator))

    def normal(self, x: Tensor) -> Tensor:
        return self._rows(x, lambda row, generator: row.normal_(generator=generator))

    @classmethod
    def joined(cls, parts: Sequence["ImageDraws"]) -> "ImageDraws":
        """The noise of several batches, one after another."""
        joined = cls(0, [])
        joined.generators = [generator for part in parts for generator in part.generators]
        return joined

    def rows(self, index: Tensor) -> "ImageDraws":
        chosen = ImageDraws(0, [])
        chosen.generators = [self.generators[row] for row in index.tolist()]
        return chosen

    def _rows(self, x: Tensor, fill: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        if len(x) != len(self.generators):
            raise UserError(f"noise of {number_of(len(self.generators), 'image')} for a batch of {len(x)}")
        rows = [fill(torch.empty(x.shape[1:]), generator) for generator in self.generators]
        return torch.stack(rows).to(x) if rows else torch.empty_like(x)
