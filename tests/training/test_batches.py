import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advmoe.training.batches import epoch_order


def batches(order, size):
    return [set(order[start : start + size].tolist()) for start in range(0, len(order), size)]


def assert_valid(orders, levels, images, size):
    assert len(orders) == levels
    for order in orders:
        assert sorted(order.tolist()) == list(range(images))
    if levels == 2:
        for first, second in zip(*(batches(order, size) for order in orders), strict=True):
            assert len(first) == len(second)
            assert not first & second


@pytest.mark.parametrize("size", range(1, 9))
def test_both_levels_see_every_image_and_share_none_in_an_iteration(size):
    for images in range(2 * size, 4 * size + 3):
        for seed in range(5):
            assert_valid(epoch_order(seed, 3, 2, images, size), 2, images, size)


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), size=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_both_levels_share_no_image_at_any_size(data, size, seed, epoch):
    images = data.draw(st.integers(2 * size, 2 * size + 200))
    assert_valid(epoch_order(seed, epoch, 2, images, size), 2, images, size)


@pytest.mark.parametrize(("images", "size"), [(1, 1), (10, 3), (5, 100)])
def test_one_level_is_a_permutation_at_any_batch_size(images, size):
    assert_valid(epoch_order(0, 0, 1, images, size), 1, images, size)


@pytest.mark.parametrize(("images", "size"), [(256, 128), (257, 128), (1001, 128), (50, 7)])
def test_the_same_seed_and_epoch_give_the_same_order(images, size):
    first, second = (epoch_order(4, 2, 2, images, size) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_seeds_and_epochs_give_different_orders():
    orders = [epoch_order(seed, epoch, 2, 100, 10) for seed in (0, 1) for epoch in (0, 1)]
    distinct = {tuple(order.tolist()) for levels in orders for order in levels}
    assert len(distinct) == 8


def test_the_first_level_does_not_depend_on_a_second():
    assert np.array_equal(epoch_order(1, 5, 1, 64, 8)[0], epoch_order(1, 5, 2, 64, 8)[0])


def test_the_global_generator_is_not_used():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    epoch_order(0, 0, 2, 100, 10)
    assert np.array_equal(np.random.get_state()[1], before)


def test_every_second_batch_is_possible():
    # over many epochs, each of the 6 images must be in the same iteration as each other image
    pairs = {(a, b) for epoch in range(200) for a, b in zip(*epoch_order(0, epoch, 2, 6, 1), strict=True)}
    assert pairs == {(a, b) for a in range(6) for b in range(6) if a != b}
