"""The figures of an epoch from its sums."""

import pytest
import torch

from advmoe.training.totals import means


@pytest.mark.parametrize(
    ("name", "mean"), [("loss", 3.0), ("penalty", 3.0), ("images", 3.0), ("my_loss", 3.0), ("router_loss", 6.0)]
)
def test_sums_are_divided_by_the_images_that_they_are_over(name, mean):
    """Only the routers' loss is over fewer images: those of the iterations in which routers learn."""
    sums = {name: torch.tensor(24.0), "router_images": torch.tensor(4.0)}
    assert means(sums, images=8) == {name: mean}


def test_a_metric_of_zero_is_finite():
    assert means({"penalty": torch.tensor(0.0)}, images=8) == {"penalty": 0.0}
