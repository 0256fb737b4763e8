import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from damage import huge_png
from PIL import Image
from refusal import refusal

from advmoe.data.decode import MAX_PIXELS, OTHER_DEPTHS, decode, decode_all, decode_fitted, stored_size
from advmoe.errors import UserError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards; blue is constant."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (255 * columns / (width - 1), 255 * rows / (height - 1), np.full((height, width), 77))
    return np.stack(channels, -1).round().astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(array: np.ndarray, orientation: int, kind: str = "PNG") -> bytes:
    """An image with an orientation in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, kind, exif=exif)


def error_line(function: Any, data: bytes, size: int = 8) -> str:
    return refusal(function, data, size, "here")


BOTH = pytest.mark.parametrize("function", [decode, decode_fitted])


@BOTH
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_images_of_the_right_size_keep_every_pixel(function: Any, kind: str) -> None:
    array = noise(8, 8)
    out = function(encoded(array, kind), 8, "here")
    assert (out.shape, out.dtype) == ((3, 8, 8), np.uint8)
    np.testing.assert_array_equal(out, array.transpose(2, 0, 1))


@BOTH
def test_lossless_webp_is_read(function: Any) -> None:
    array = noise(8, 8)
    np.testing.assert_array_equal(function(encoded(array, "WEBP", lossless=True), 8, "here"), array.transpose(2, 0, 1))


@BOTH
@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_other_colours_become_rgb(function: Any, mode: str) -> None:
    image = Image.fromarray(smooth(8, 8)).convert(mode)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(function(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), 8, "here"), expected)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK")
    mean = decode(encoded(image, "JPEG", quality=95), 16, "here").reshape(3, -1).mean(1)
    np.testing.assert_allclose(mean, (200, 40, 40), atol=4)


@BOTH
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_sixteen_bits_is_rounded_to_eight(function: Any, order: str) -> None:
    levels = noise(8, 8)[:, :, 0]
    deep = levels.astype(order) * 257
    deep[0, 0] = 257 * 100 + 128  # nearer to 100 than to 101, by half a step
    expected = levels.copy()
    expected[0, 0] = 100
    data = encoded(Image.fromarray(deep.astype(order)), "TIFF")
    np.testing.assert_array_equal(function(data, 8, "here"), np.stack([expected] * 3))


@BOTH
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused_not_cut_off(function: Any, dtype: type) -> None:
    data = encoded(Image.fromarray(np.full((8, 8), 3000, dtype=dtype)), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode in OTHER_DEPTHS
        reason = f"the image has pixels of kind {image.mode}, not of 8 or 16 bits: convert it first"
        assert error_line(function, data) == f"here: {reason}"


@BOTH
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_images_are_an_error(function: Any, kind: str, share: float) -> None:
    array = noise(64, 64)
    data = encoded(array, kind)
    assert function(data, 64, "here").shape == (3, 64, 64)
    assert error_line(function, data[: int(share * len(data))], 64).startswith("here: not an image that can be decoded (")


@BOTH
@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", encoded(noise(8, 8), "EPS")])
def test_no_image(function: Any, data: bytes) -> None:
    assert error_line(function, data).startswith("here: not an image that can be decoded (")


def test_another_size_is_refused() -> None:
    assert error_line(decode, encoded(noise(8, 9)), 8) == "here: the image is 9 x 8, not 8 x 8"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (64_000_001, 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    text = error_line(decode_fitted, huge_png(width, height))
    assert text == f"here: the image is {width} x {height}: more than 64,000,000 pixels"
    assert width * height > MAX_PIXELS


def test_the_largest_number_of_pixels_is_not_refused() -> None:
    assert "image file is truncated" in error_line(decode_fitted, huge_png(8000, 8000))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 40), (40, 24), (7, 11), (100, 8)])
def test_fitted_takes_the_middle_of_the_shorter_sides_length(height: int, width: int) -> None:
    out = decode_fitted(encoded(smooth(height, width)), 8, "here").astype(float)
    short = min(height, width)
    top, left = (height - short) / 2, (width - short) / 2
    centres = (np.arange(8) + 0.5) * short / 8 - 0.5
    columns, rows = 255 * (left + centres) / (width - 1), 255 * (top + centres) / (height - 1)
    middle = slice(1, -1)  # at the border the filter is cut off
    np.testing.assert_allclose(out[0, middle, middle], np.broadcast_to(columns, (8, 8))[middle, middle], atol=4)
    np.testing.assert_allclose(out[1, middle, middle], np.broadcast_to(rows[:, None], (8, 8))[middle, middle], atol=4)
    assert (out[2] == 77).all()


def test_fitted_resizing_is_antialiased() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    out = decode_fitted(encoded(np.stack([board] * 3, -1).astype(np.uint8)), 8, "here")
    assert np.abs(out[:, 1:-1, 1:-1].astype(float) - 127.5).max() < 8  # without it each pixel would be black or white


def test_fitted_image_may_be_one_pixel_wide() -> None:
    assert decode_fitted(encoded(noise(5000, 1)), 8, "here").shape == (3, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exact_images_are_taken_as_they_are_stored(orientation: int) -> None:
    array = noise(8, 8)
    np.testing.assert_array_equal(decode(oriented(array, orientation), 8, "here"), array.transpose(2, 0, 1))


def test_size_is_width_and_height() -> None:
    assert stored_size(encoded(noise(5, 9)), "here") == (9, 5)
    with pytest.raises(UserError, match="here: not an image that can be decoded"):
        stored_size(b"text", "here")


# Many


def test_all_rows_come_in_their_order() -> None:
    arrays = [noise(8, 8, seed=seed) for seed in range(50)]
    items = [encoded(array) for array in arrays]
    out = decode_all(50, 8, lambda row: decode(items[row], 8, f"row {row}"))
    np.testing.assert_array_equal(out, np.stack(arrays).transpose(0, 3, 1, 2))
    assert (out.shape, out.dtype) == ((50, 3, 8, 8), np.uint8)


def test_the_first_bad_row_is_named() -> None:
    items = [encoded(noise(8, 8))] * 40
    items[11], items[12], items[39] = b"x", encoded(noise(9, 9)), b""
    with pytest.raises(UserError, match=r"^row 11: not an image"):
        decode_all(40, 8, lambda row: decode(items[row], 8, f"row {row}"))


def test_only_a_few_images_are_decoded_at_a_time() -> None:
    alive, most, lock = 0, 0, threading.Lock()

    def image(row: int) -> np.ndarray:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        out = np.full((3, 4, 4), row % 256, dtype=np.uint8)
        time.sleep(0.0005)
        with lock:
            alive -= 1
        return out

    out = decode_all(500, 4, image)
    assert out[:, 0, 0, 0].tolist() == [row % 256 for row in range(500)]
    assert 1 <= most <= 32


@pytest.mark.filterwarnings("error")
def test_warnings_of_odd_metadata_are_not_shown() -> None:
    image = Image.fromarray(noise(8, 8)).quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    assert decode_all(2, 8, lambda row: decode(data, 8, "here")).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(("count", "size"), [(10, 10**7), (10**6, 10**6), (1, 10**12)])
def test_more_images_than_fit_into_memory(count: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"^{count} images of {size} x {size} need \d+ GiB of memory$"):
        decode_all(count, size, lambda row: pytest.fail("decoded"))
