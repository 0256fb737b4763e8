"""Configurations that cannot be trained."""

from typing import Any

import pytest

from advmoe.errors import UserError
from advmoe.training.checks import check


@pytest.mark.parametrize("size", [31, 60])
def test_batches_of_two_levels_need_twice_their_images(tiny: Any, splits: Any, size: int) -> None:
    images = len(splits.train)
    assert images == 60
    config = tiny(batch_size=size, sync_norm=True)
    with pytest.raises(UserError, match=rf"^batch_size must be at most half of the 60 training images for two levels, not {size}$"):
        check(config, splits)
    check(config.replace(training=config.training.replace(level_batches="same")), splits)
    check(tiny(method="at_moe", batch_size=size), splits)


@pytest.mark.parametrize(
    ("options", "needed"),
    [({"balance_weight": 0.1}, "balance"), ({"router_target_weight": 2.0}, "router_target"), ({"awp_from": 0.5}, "awp")],
)
def test_an_option_without_the_one_that_it_belongs_to_is_refused(tiny: Any, splits: Any, options: Any, needed: str) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))} needs {needed}$"):
        check(tiny(**options), splits)
