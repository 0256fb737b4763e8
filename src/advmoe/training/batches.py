"""The order of the training images. It depends only on the seed and the epoch."""

import numpy as np

from advmoe.errors import UserError


def epoch_order(seed: int, epoch: int, levels: int, images: int, batch_size: int) -> list[np.ndarray]:
    """For each level one permutation [images] of the training set, int64.

    In each iteration the batches of two levels have no image in common (appendix B: different batches for routers and experts).
    Raises UserError if two batches are larger than the training set.
    """
    random = np.random.default_rng([seed, epoch])
    orders = [random.permutation(images)]
    if levels == 2:
        if 2 * batch_size > images:
            raise UserError(f"batch_size must be at most half of the {images} training images for two levels, not {batch_size}")
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
