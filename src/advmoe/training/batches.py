"""The batches of an epoch, and the order of the training images, which depends only on the seed and the epoch."""

from collections.abc import Iterator

import numpy as np

from advmoe.attacks import derive_seed
from advmoe.config import DataConfig, RunConfig
from advmoe.data import Images, Source
from advmoe.data.stream import default_workers


def batches(config: RunConfig, source: Source, epoch: int, levels: int, first: int = 0) -> Iterator[tuple[Images, ...]]:
    """The batches of an epoch, from iteration `first` (from 0): for each iteration one augmented batch per level.

    Each batch contains only the images of this rank.
    """
    if config.training.level_batches == "same" and levels > 1:
        return ((images,) * levels for (images,) in _streams(config, source, epoch, 1, first))
    return _streams(config, source, epoch, levels, first)


def _augmentation(config: RunConfig, epoch: int) -> DataConfig:
    """The data settings of an epoch (from 0): `crop_flip` before the share `augment_from` of its phase."""
    epochs = config.training.epochs
    # not augment_from * epochs, which is rounded: 0.55 * 100 is more than 55
    return config.data if (epoch % epochs) / epochs >= config.data.augment_from else config.data.replace(augment="crop_flip")


def _streams(config: RunConfig, source: Source, epoch: int, levels: int, first: int) -> Iterator[tuple[Images, ...]]:
    size = config.training.batch_size
    streams, data = [], _augmentation(config, epoch)
    if levels > 1:
        data = data.replace(workers=max(1, (data.workers or default_workers()) // levels))
    for level, order in enumerate(epoch_order(config.seed, epoch + 1, levels, len(source), size)):
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        seeds = [derive_seed(config.seed, epoch, iteration, level) for iteration in range(len(rows))]
        streams.append(source.augmented(rows[first:], seeds[first:], data))
    return zip(*streams, strict=True)


def epoch_order(seed: int, epoch: int, levels: int, images: int, batch_size: int) -> list[np.ndarray]:
    """For each level one permutation [images] of the training set, int64.

    In each iteration the batches of two levels have no image in common (appendix B: different batches for routers and experts).
    For that, `batch_size` must be at most half of `images`.
    """
    random = np.random.default_rng([seed, epoch])
    orders = [random.permutation(images)]
    if levels == 2:
        assert 2 * batch_size <= images  # checks.check
        orders.append(_disjoint(orders[0], random.permutation(images), batch_size, random))
    return orders


def _disjoint(first: np.ndarray, second: np.ndarray, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Swap images between the batches of `second` until its batch i has no image of batch i of `first`.

    There is always an image to swap with: n - b images are not in that batch of `first`, and at most b - 1 of them are in that
    batch of `second` (n images, batches of b).
    """
    batch_numbers = np.arange(len(first)) // batch_size
    batch_of = np.empty_like(first)
    batch_of[first] = batch_numbers
    for row in np.flatnonzero(batch_of[second] == batch_numbers):
        if batch_of[second[row]] != batch_numbers[row]:  # an earlier swap has moved the image away
            continue
        partners = np.flatnonzero((batch_numbers != batch_numbers[row]) & (batch_of[second] != batch_numbers[row]))
        partner = random.choice(partners)
        second[[row, partner]] = second[[partner, row]]
    return second
