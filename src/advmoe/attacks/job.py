"""The input of an attack: the images of one shard, the network, and the threat model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advmoe.attacks.draws import ImageDraws, derive_seed
from advmoe.attacks.pgd import Predict
from advmoe.config.choices import BATCH_SIZE, PATHWAY_BUDGET, Norm


@dataclass(frozen=True)
class Setting:
    """What decides whether an attack can run. `shape` is (C, H, W); `transfer` says whether there is a network to transfer from.

    `pathway_budget`: the number of pathways up to which all are attacked; with 0, none is.
    """

    norm: Norm
    num_classes: int
    shape: tuple[int, int, int]
    routed: bool
    transfer: bool
    pathway_budget: int = PATHWAY_BUDGET


@dataclass(frozen=True)
class Job:
    """The images x [B, C, H, W] of one shard, with labels y [B], and the network to attack.

    `predict` is the frozen network, `images` the images' numbers in the test set, `epsilon` a distance in pixels of [0, 1].
    `shard` seeds attacks that cannot draw noise for each image separately. `pathway_budget` is the number of pathways up to
    which all are attacked. `batch_size` is the largest number of images that an attack may run at once, if it joins ascents.
    """

    predict: Any
    x: Tensor
    y: Tensor
    images: Sequence[int]
    epsilon: float
    norm: Norm
    seed: int
    shard: int
    num_classes: int
    transfer: Predict | None = None
    pathway_budget: int = PATHWAY_BUDGET
    batch_size: int = BATCH_SIZE

    def draws(self, *numbers: int) -> ImageDraws:
        """Noise that depends only on the seed, the image and `numbers`."""
        return ImageDraws(derive_seed(self.seed, *numbers), self.images)
