"""The figures of an epoch from its sums."""

import pytest
import torch

from advmoe import distributed
from advmoe.training.manifest import Partial
from advmoe.training.totals import Totals, means


@pytest.mark.parametrize(
    ("name", "mean"), [("loss", 3.0), ("penalty", 3.0), ("images", 3.0), ("my_loss", 3.0), ("router_loss", 6.0)]
)
def test_sums_are_divided_by_the_images_that_they_are_over(name, mean):
    """Only the routers' loss is over fewer images: those of the iterations in which routers learn."""
    sums = {name: torch.tensor(24.0), "router_images": torch.tensor(4.0)}
    assert means(sums, images=8) == {name: mean}


def test_a_metric_of_zero_is_finite():
    assert means({"penalty": torch.tensor(0.0)}, images=8) == {"penalty": 0.0}


PARTIAL = Partial(iteration=2, images=[7, 6], seconds=1.5, sums={"loss": [1.0, 2.0], "load": [[[1, 0]], [[0, 2]]]})


def test_another_number_of_ranks_continues_with_the_sums_of_all():
    totals = Totals.resumed(PARTIAL)
    assert (totals.iteration, totals.images, totals.sums["loss"].item(), totals.sums["load"].tolist()) == (2, 13, 3.0, [[1, 2]])
    assert totals.seconds >= 1.5


@pytest.mark.parametrize(("rank", "size", "expected"), [(0, 2, (7, 1.0)), (1, 2, (6, 2.0)), (0, 3, (13, 3.0)), (2, 3, (0, 0.0))])
def test_each_rank_continues_with_its_own_sums_and_new_ones_with_none(rank, size, expected, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    totals = Totals.resumed(PARTIAL)
    assert (totals.images, totals.sums["loss"].item()) == expected
