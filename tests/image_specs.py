"""The images of a tiny network in a test."""

from collections.abc import Sequence

from advmoe.data import ImageSpec


def image_spec(num_classes: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.25,) * 3) -> ImageSpec:
    """Images of 32x32 pixels, with a channel for each entry of `mean` and `std`."""
    return ImageSpec(tuple(f"class {number}" for number in range(num_classes)), (len(mean), 32, 32), tuple(mean), tuple(std))
