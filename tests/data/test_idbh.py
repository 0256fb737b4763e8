"""Each operation in batches against Pillow's, one image at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from advmoe.data import idbh

COUNT = 12


def images(channels: int = 3) -> Tensor:
    """Smooth images of few and of many values."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(COUNT, channels, 4, 5, generator=random)
    smooth = (
        torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear") ** torch.linspace(0.3, 3, COUNT)[:, None, None, None]
    )
    return (255 * smooth).round().to(torch.uint8)


def draws(operation: float, strength: Tensor, sign: float = 0.9, axis: float = 0.9) -> Tensor:
    rest = [torch.full((COUNT,), value) for value in (operation, sign, axis)]
    return torch.stack([rest[0], strength, rest[1], rest[2]])[..., None]


def one_by_one(raw: Tensor, change) -> np.ndarray:
    out = [np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()), row)) for row, image in enumerate(raw)]
    return np.stack(out).transpose(0, 3, 1, 2).astype(int)


STRENGTH = torch.linspace(0, 0.999, COUNT)
WIDE, NARROW = (0.1 + 1.8 * STRENGTH).tolist(), (0.5 + 1.4 * STRENGTH).tolist()
PILLOW = [
    lambda image, row: ImageEnhance.Color(image).enhance(WIDE[row]),
    lambda image, row: ImageEnhance.Brightness(image).enhance(NARROW[row]),
    lambda image, row: ImageEnhance.Contrast(image).enhance(NARROW[row]),
    lambda image, row: ImageEnhance.Sharpness(image).enhance(WIDE[row]),
    lambda image, row: ImageOps.autocontrast(image),
    lambda image, row: ImageOps.equalize(image),
]


@pytest.mark.parametrize("number", range(6))
def test_colours_are_pillows_up_to_rounding(number: int) -> None:
    raw = images()
    out = idbh.one_operation(raw, draws((number + 0.5) / 8, STRENGTH)).numpy().astype(int)
    expected = one_by_one(raw, PILLOW[number])
    assert np.abs(out - expected).max() <= (0 if number == 5 else 2)
    assert np.abs(out - raw.numpy()).max() > 10


def test_rotations_are_pillows_by_whole_degrees() -> None:
    raw = images()
    degrees = (1 + (STRENGTH * 10).floor()).tolist()
    turned = {sign: one_by_one(raw, lambda image, row, sign=sign: image.rotate(sign * degrees[row])) for sign in (1, -1)}
    signs = set()
    for draw in (0.9, 0.1):
        out = idbh.one_operation(raw, draws(7.5 / 8, STRENGTH, sign=draw)).numpy()
        signs.add(max(turned, key=lambda sign, out=out: (out == turned[sign]).mean()))
        assert max((out == expected).mean() for expected in turned.values()) > 0.97
    assert signs == {1, -1}


def test_a_shear_moves_each_row_by_its_distance_from_the_centre() -> None:
    raw = torch.zeros(COUNT, 1, 21, 21, dtype=torch.uint8)
    raw[:, :, :, 10] = 255
    out = idbh.one_operation(raw, draws(6.5 / 8, torch.full((COUNT,), 1.0), axis=0.1))[0, 0]
    columns = out.argmax(dim=1).tolist()
    assert columns == [10 - round(math.tan(0.15) * (row - 10)) for row in range(21)]
    other = idbh.one_operation(raw.mT, draws(6.5 / 8, torch.full((COUNT,), 1.0), axis=0.9))[0, 0]
    assert torch.equal(other.mT, out)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_flat_images_survive_every_operation(channels: int) -> None:
    flat = torch.full((COUNT, channels, 2, 3), 77, dtype=torch.uint8)
    for number in range(8):
        out = idbh.one_operation(flat, draws((number + 0.5) / 8, STRENGTH))
        assert (out.shape, out.dtype) == (flat.shape, torch.uint8)
        if number not in (1, 6, 7):  # all but brightness, shear and rotation
            assert torch.equal(out, flat)


def test_erased_rectangles_by_hand() -> None:
    raw = torch.full((3, 2, 10, 20), 9, dtype=torch.uint8)
    uniform = torch.full((idbh.ERASE_DRAWS, 3, 1), 0.5)
    uniform[0] = torch.tensor([0.4, 0.6, 0.4])[:, None]
    uniform[3:13] = (0.25 - 0.02) / 0.31  # a quarter of the area: 50 pixels
    uniform[13:] = 0.5  # exp of the mean of log 0.3 and log 3.3 is 0.995: 7 x 7
    uniform[13, 2] = 0.9999  # the first size of the last image is 13 rows, which do not fit
    out = idbh.erase(raw, uniform)
    start = (int(0.5 * (10 - 7 + 1)), int(0.5 * (20 - 7 + 1)))
    for image in (0, 2):
        black = (out[image] == 0).all(dim=0).nonzero()
        assert (black.amin(dim=0).tolist(), len(black)) == ([*start], 49)
        assert (out[image] == 0).sum() == 2 * 49
    assert torch.equal(out[1], raw[1])


def test_half_of_the_images_are_erased_and_none_if_nothing_fits() -> None:
    random = torch.rand(idbh.ERASE_DRAWS, 2000, 1, generator=torch.Generator().manual_seed(0))
    shares = (idbh.erase(torch.ones(2000, 1, 32, 32, dtype=torch.uint8), random) == 0).float().mean(dim=(1, 2, 3))
    assert 900 < (shares > 0).sum() < 1100
    assert 0.015 < shares[shares > 0].min() < shares.max() < 0.35
    assert idbh.erase(torch.ones(2000, 1, 1, 1, dtype=torch.uint8), random).all()
