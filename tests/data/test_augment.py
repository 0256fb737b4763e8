import numpy as np
import pytest
import torch
from torch import Tensor

from advmoe.config import DataConfig
from advmoe.data import Images
from advmoe.data.augment import AUGMENTATIONS, augment, augmentation_draws, crop_shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, channels: int = 3, height: int = 5, width: int = 7) -> Tensor:
    return torch.randint(1, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator(17))


def crops(image: Tensor, padding: int) -> dict[tuple[int, int, bool], np.ndarray]:
    """Every crop of one zero-padded image, by row offset, column offset and mirroring."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image.numpy()
    variants = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            variants[row, column, False] = crop
            variants[row, column, True] = crop[:, :, ::-1]
    return variants


def augmented(raw: Tensor, padding: int, flip: bool, random: torch.Generator) -> Tensor:
    return augment(raw, padding, flip, augmentation_draws(len(raw), random))


def reference(raw: Tensor, padding: int, flip: bool, seed: int) -> np.ndarray:
    """The same draws, applied image by image."""
    draws = torch.rand(3, len(raw), 1, generator=generator(seed))[..., 0].tolist()
    size = 2 * padding + 1
    out = []
    for image, down, right, mirror in zip(raw, *draws, strict=True):
        out.append(crops(image, padding)[int(down * size), int(right * size), flip and mirror < 0.5])
    return np.stack(out)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 2, 4])
@pytest.mark.parametrize("batch", [1, 33])
def test_agrees_with_one_image_at_a_time(batch: int, padding: int, flip: bool) -> None:
    raw = images(batch)
    expected = reference(raw, padding, flip, seed=5)
    np.testing.assert_array_equal(augmented(raw, padding, flip, generator(5)).numpy(), expected)


def test_every_crop_occurs_about_as_often() -> None:
    image, copies = images(1), 9 * 2 * 200
    names = {crop.tobytes(): name for name, crop in crops(image[0], 1).items()}
    assert len(names) == 18
    out = augmented(image.expand(copies, -1, -1, -1), 1, True, generator())
    counts = np.unique([str(names[crop.tobytes()]) for crop in out.numpy()], return_counts=True)[1]
    assert len(counts) == 18
    assert 140 < counts.min() <= counts.max() < 260  # 200 expected, standard deviation 13.7


def test_flip_alone_mirrors_about_half() -> None:
    raw = images(1000, 1)
    out = augmented(raw, 0, True, generator())
    mirrored = (out == raw.flip(3)).flatten(1).all(1)
    unchanged = (out == raw).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert 430 < mirrored.sum() < 570


def test_no_padding_and_no_flip_change_nothing() -> None:
    raw = images(8)
    assert torch.equal(augmented(raw, 0, False, generator()), raw)


def test_images_are_augmented_independently() -> None:
    raw = images(1).expand(64, -1, -1, -1)
    out = augmented(raw, 4, True, generator())
    assert len(torch.unique(out.flatten(1), dim=0)) > 30


def test_depends_on_the_generator_alone() -> None:
    raw = images(16)
    torch.manual_seed(0)
    first = augmented(raw, 2, True, generator(3))
    torch.manual_seed(1)
    assert torch.equal(augmented(raw, 2, True, generator(3)), first)
    assert not torch.equal(augmented(raw, 2, True, generator(4)), first)


def test_leaves_global_random_state_and_input_alone() -> None:
    raw = images(16)
    copy, before = raw.clone(), torch.random.get_rng_state()
    augmented(raw, 2, True, generator())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(raw, copy)


@pytest.mark.parametrize("flip", [True, False])
def test_crops_do_not_depend_on_whether_images_are_mirrored(flip: bool) -> None:
    symmetric = images(16).float().mean(3, keepdim=True).expand(-1, -1, -1, 7).to(torch.uint8)
    out = augmented(symmetric, 2, flip, generator(8))
    rows_only = augmented(symmetric, 2, False, generator(8))
    assert torch.equal(out[:, :, :, 2:5].flip(3), rows_only[:, :, :, 2:5])


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (2, 3, 32, 32), (3, 3, 8, 5)])
def test_shape_and_type_stay(shape: tuple[int, ...]) -> None:
    out = augmented(torch.full(shape, 255, dtype=torch.uint8), 2, True, generator())
    assert out.shape == shape
    assert out.dtype == torch.uint8
    assert set(out.unique().tolist()) <= {0, 255}


# CropShift


def moved(image: np.ndarray, draws: list[float], limit: int) -> np.ndarray:
    """CropShift of one image."""
    height, width = image.shape[1:]
    removed = int(draws[0] * (limit + 1))
    across = int(draws[1] * (removed + 1))
    down = removed - across
    top, left, to_top, to_left = (int(draw * (most + 1)) for draw, most in zip(draws[2:6], (down, across) * 2, strict=True))
    source = image[:, :, ::-1] if draws[6] < 0.5 else image
    out = np.zeros_like(image)
    crop = source[:, top : top + height - down, left : left + width - across]
    out[:, to_top : to_top + height - down, to_left : to_left + width - across] = crop
    return out


@pytest.mark.parametrize(("height", "width", "limit"), [(14, 12, 10), (5, 7, 4)])
def test_crop_shift_agrees_with_one_image_at_a_time(height: int, width: int, limit: int) -> None:
    raw = images(200, 3, height, width)
    draws = augmentation_draws(200, generator(3), 7)
    out = crop_shift(raw, True, draws).numpy()
    expected = [moved(image, values, limit) for image, values in zip(raw.numpy(), draws[..., 0].T.tolist(), strict=True)]
    np.testing.assert_array_equal(out, np.stack(expected))


def test_crop_shift_by_hand() -> None:
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    draws = torch.tensor([0.9, 0.5, 0.0, 0.99, 0.99, 0.0, 0.7])[:, None, None]  # 2 removed: 1 column and 1 row
    assert crop_shift(image, True, draws)[0, 0].tolist() == [[0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0]]


def test_crop_shift_removes_zero_to_ten_rows_and_columns_equally_often() -> None:
    out = crop_shift(torch.full((4400, 1, 32, 32), 255, dtype=torch.uint8), False, augmentation_draws(4400, generator(), 7))
    rows, columns = (32 - (out[:, 0].amax(dim=axis) > 0).sum(dim=1) for axis in (2, 1))
    counts = torch.bincount(rows + columns)
    assert len(counts) == 11
    assert 320 < counts.min() <= counts.max() < 480  # 400 expected, standard deviation 19


def test_batches_get_the_augmentation_that_is_configured() -> None:
    source = Images(images(40, 3, 16, 16), torch.arange(40))
    for name, augmentation in AUGMENTATIONS.items():
        data = DataConfig(augment=name)
        first, second = (next(source.augmented([np.arange(40)], [7], data)) for _ in range(2))
        expected = augmentation.apply(source.raw, data, augmentation_draws(40, generator(7), augmentation.count))
        assert torch.equal(first.raw, expected)
        assert torch.equal(first.raw, second.raw)
        assert first.raw.dtype == torch.uint8
        assert not torch.equal(next(source.augmented([np.arange(40)], [8], data)).raw, first.raw)
