import numpy as np
import pytest
import torch
from torch import Tensor

from advmoe.data.augment import augment, augmentation_draws


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, channels: int = 3, height: int = 5, width: int = 7) -> Tensor:
    return torch.randint(1, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator(17))


def crops(image: Tensor, padding: int) -> dict[tuple[int, int, bool], np.ndarray]:
    """Every crop of one zero-padded image, by row offset, column offset and mirroring; slow and plain."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image.numpy()
    found = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            found[row, column, False] = crop
            found[row, column, True] = crop[:, :, ::-1]
    return found


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
    wanted = reference(raw, padding, flip, seed=5)
    np.testing.assert_array_equal(augmented(raw, padding, flip, generator(5)).numpy(), wanted)


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
    kept = (out == raw).flatten(1).all(1)
    assert (mirrored ^ kept).all()
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
