"""The order in which training images are drawn: a function of seed and epoch alone."""

import numpy as np

from advmoe.errors import UserError


def epoch_order(seed: int, epoch: int, levels: int, images: int, batch_size: int) -> list[np.ndarray]:
    """One permutation of the training set for each level, such that no image is in two levels' batches of the same
    iteration (appendix B: different batches for routers and experts).

    Raises UserError where the set is too small for that.
    """
    random = np.random.default_rng([seed, epoch])
    orders = [random.permutation(images)]
    if levels == 2:
        if 2 * batch_size > images:
            raise UserError(f"batch_size must be at most half of the {images} training images for two levels, not {batch_size}")
        orders.append(_disjoint(orders[0], random.permutation(images), batch_size, random))
    return orders


def _disjoint(first: np.ndarray, second: np.ndarray, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """`second` with images swapped between its batches until batch i shares none with batch i of `first`.

    A swap partner always exists: n - b images are outside first's batch, at most b - 1 of them in second's.
    """
    place = np.arange(len(first)) // batch_size
    batch_of = np.empty_like(first)
    batch_of[first] = place
    for row in np.flatnonzero(batch_of[second] == place):
        if batch_of[second[row]] != place[row]:  # an earlier swap has moved the image away
            continue
        partners = np.flatnonzero((place != place[row]) & (batch_of[second] != place[row]))
        partner = random.choice(partners)
        second[[row, partner]] = second[[partner, row]]
    return second
