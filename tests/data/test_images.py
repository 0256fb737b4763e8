import re

import numpy as np
import pytest
import torch
from refusal import refusal

from advmoe.data.images import Images, balanced, fingerprint, from_arrays, hold_out, in_content_order, limit
from advmoe.errors import UserError


def numbered(labels: list[int]) -> Images:
    """Images whose first two pixels encode their row."""
    raw = np.zeros((len(labels), 1, 2, 2), dtype=np.uint8)
    raw[:, 0, 0, 0] = np.arange(len(labels)) % 256
    raw[:, 0, 0, 1] = np.arange(len(labels)) // 256
    return from_arrays(raw, labels, max(labels) + 1, "test")


def rows(images: Images) -> list[int]:
    return (images.raw[:, 0, 0, 0].int() + 256 * images.raw[:, 0, 0, 1].int()).tolist()


def shuffled_labels(counts: list[int]) -> list[int]:
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(3).permutation(labels).tolist()


@pytest.mark.parametrize("count", [10, 20, 35, 99, 100])
def test_balanced_takes_as_many_of_each_class(count: int) -> None:
    labels = torch.tensor(shuffled_labels([10] * 10))
    chosen = torch.bincount(labels[balanced(labels, count)], minlength=10)
    assert chosen.sum() == count
    assert chosen.max() - chosen.min() <= (0 if count % 10 == 0 else 1)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (9, 9), (30, 30), (31, 30), (10**9, 30)])
def test_balanced_with_extreme_counts(count: int, expected: int) -> None:
    chosen = balanced(torch.tensor(shuffled_labels([3] * 10)), count)
    assert len(chosen) == expected
    assert chosen.dtype == torch.int64


def test_balanced_gives_sorted_rows_each_once() -> None:
    chosen = balanced(torch.tensor(shuffled_labels([10] * 10)), 42)
    assert (chosen.diff() > 0).all()


def test_balanced_takes_the_rest_from_the_larger_classes() -> None:
    labels = torch.tensor(shuffled_labels([1, 2, 20]))
    assert torch.bincount(labels[balanced(labels, 12)]).tolist() == [1, 2, 9]


def test_balanced_is_deterministic_and_does_not_change_random_states() -> None:
    labels = torch.tensor(shuffled_labels([10] * 10))
    before = torch.random.get_rng_state()
    first = balanced(labels, 20)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(balanced(labels, 20), first)


def test_balanced_subsets_are_nested() -> None:
    labels = torch.tensor(shuffled_labels([10] * 10))
    assert set(balanced(labels, 20).tolist()) < set(balanced(labels, 50).tolist())


def test_balanced_does_not_take_just_the_first_rows() -> None:
    labels = torch.arange(1000) // 100
    assert set((balanced(labels, 100) % 100).tolist()) > set(range(0, 100, 50))
    assert balanced(labels, 10).tolist() != list(range(0, 1000, 100))


def test_hold_out_splits_are_disjoint_and_complete() -> None:
    rest, held_out = hold_out(numbered(shuffled_labels([50] * 10)), 0.1)
    assert sorted(rows(rest) + rows(held_out)) == list(range(500))
    assert (len(rest), len(held_out)) == (450, 50)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([50] * 4, 0.1, [5] * 4),
        ([100, 20], 0.2, [20, 4]),
        ([100, 20, 2], 0.02, [2, 1, 1]),
        ([4, 4], 0.001, [1, 1]),
        ([4, 2], 0.99, [3, 1]),
        ([100, 0, 10], 0.1, [10, 0, 1]),
    ],
)
def test_hold_out_is_stratified(counts: list[int], share: float, expected: list[int]) -> None:
    rest, held_out = hold_out(numbered(shuffled_labels(counts)), share)
    assert torch.bincount(held_out.labels, minlength=len(counts)).tolist() == expected
    assert (torch.bincount(rest.labels, minlength=len(counts)) + torch.tensor(expected)).tolist() == counts


def test_hold_out_is_the_same_for_every_run() -> None:
    images = numbered(shuffled_labels([50] * 10))
    torch.manual_seed(1)
    first = rows(hold_out(images, 0.1)[1])
    torch.manual_seed(2)
    assert rows(hold_out(images, 0.1)[1]) == first


def test_hold_out_keeps_labels_with_their_images() -> None:
    images = numbered(shuffled_labels([20] * 10))
    for part in hold_out(images, 0.2):
        assert part.labels.tolist() == images.labels[rows(part)].tolist()


def test_hold_out_refuses_a_class_of_one_image() -> None:
    with pytest.raises(UserError, match="class 1 has 1 training image"):
        hold_out(numbered([0, 0, 1, 2, 2]), 0.5)


def test_limit_none_keeps_everything() -> None:
    images = numbered([0, 1, 0, 1])
    assert limit(images, None) is images


@pytest.mark.parametrize(("count", "expected"), [(10, [1] * 10), (25, None), (40, [4] * 10), (1000, [4] * 10)])
def test_limit_is_balanced(count: int, expected: list[int] | None) -> None:
    limited = limit(numbered(shuffled_labels([4] * 10)), count)
    chosen = torch.bincount(limited.labels, minlength=10).tolist()
    assert chosen == expected if expected else sorted(chosen) == [2] * 5 + [3] * 5


def test_limit_keeps_labels_with_their_images() -> None:
    images = numbered(shuffled_labels([20] * 10))
    limited = limit(images, 33)
    assert limited.labels.tolist() == images.labels[rows(limited)].tolist()


def test_content_order_does_not_depend_on_the_source() -> None:
    images = numbered(shuffled_labels([8] * 5))
    mixed = images[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert fingerprint(mixed) != fingerprint(images)
    assert fingerprint(in_content_order(mixed)) == fingerprint(in_content_order(images))


def test_content_order_keeps_every_image_with_its_label() -> None:
    images = numbered(shuffled_labels([8] * 5))
    ordered = in_content_order(images)
    assert sorted(rows(ordered)) == list(range(40))
    assert ordered.labels.tolist() == images.labels[rows(ordered)].tolist()


def test_fingerprint_changes_with_any_pixel_or_label() -> None:
    images = numbered([0, 1, 2])
    seen = {fingerprint(images)}
    for index in np.ndindex(*images.raw.shape):
        raw = images.raw.clone()
        raw[index] += 1
        seen.add(fingerprint(Images(raw, images.labels)))
    for row in range(3):
        labels = images.labels.clone()
        labels[row] = 7
        seen.add(fingerprint(Images(images.raw, labels)))
    assert len(seen) == 1 + images.raw.numel() + 3


def test_fingerprint_sees_shape_order_and_splits() -> None:
    a, b = numbered([0, 1, 2, 3]), numbered([3, 2])
    turned = Images(a.raw.reshape(4, 1, 4, 1), a.labels)
    swapped = a[torch.tensor([1, 0, 2, 3])]
    variants = [(a,), (turned,), (swapped,), (a, b), (b, a), (a[torch.arange(2)], a[torch.arange(2, 4)])]
    assert len({fingerprint(*parts) for parts in variants}) == len(variants)


def test_fingerprint_is_that_of_equal_content() -> None:
    a = numbered([0, 1, 2, 3])
    flipped_strides = Images(a.raw.transpose(2, 3).contiguous().transpose(2, 3), a.labels.clone())
    assert fingerprint(a) == fingerprint(flipped_strides)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(a))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10], "here: label 10 in row 2 is not a whole number from 0 to 9"),
        ([0, -1, 1], "here: label -1 in row 1 is not a whole number from 0 to 9"),
        ([None, 1, 1], "here: label None in row 0 is not a whole number from 0 to 9"),
        ([0, "7", 1], "here: label '7' in row 1 is not a whole number from 0 to 9"),
        ([0, 1.5, 1], "here: label 1.5 in row 1 is not a whole number from 0 to 9"),
        ([0, True, 1], "here: label True in row 1 is not a whole number from 0 to 9"),
        ([0, 1, 2**70], f"here: label {2**70} in row 2 is not a whole number from 0 to 9"),
        (np.array([0, 3, 255], dtype=np.uint8), "here: label 255 in row 2 is not a whole number from 0 to 9"),
        ([0, 1], "here: 3 images and 2 labels"),
        ([0, 1, 2, 3], "here: 3 images and 4 labels"),
    ],
)
def test_from_arrays_names_the_row(labels: list[int], message: str) -> None:
    assert refusal(from_arrays, np.zeros((3, 1, 2, 2), dtype=np.uint8), labels, 10, "here") == message


def test_from_arrays_refuses_empty_arrays() -> None:
    with pytest.raises(UserError, match="here: 0 images and 0 labels"):
        from_arrays(np.zeros((0, 1, 2, 2), dtype=np.uint8), [], 10, "here")


def test_from_arrays_gives_tensors_of_the_right_kind() -> None:
    source = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    images = from_arrays(source.transpose(0, 1, 3, 2), np.array([1, 0], dtype=np.uint8), 2, "here")
    assert (images.raw.dtype, images.labels.dtype, len(images)) == (torch.uint8, torch.int64, 2)
    assert images.raw.tolist() == source.transpose(0, 1, 3, 2).tolist()


def test_pixels_lie_in_zero_to_one() -> None:
    pixels = Images(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), torch.tensor([0])).pixels()
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.flatten(), torch.tensor([0.0, 0.2, 1.0]))
