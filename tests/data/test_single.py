"""Images of every kind a user may have, as a network takes them."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import refusal

from advmoe.data.single import MAX_BYTES, fit_image, read_image
from advmoe.data.stream import centre_crop

COLOUR, GREY = (3, 8, 8), (1, 8, 8)


def noise(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(path: Path, image: np.ndarray | Image.Image, **options: Any) -> Path:
    file = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file.save(path, **options)
    return path


def exact(image: np.ndarray) -> torch.Tensor:
    """The pixels that [H, W, 3] uint8 must give, to the last bit."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255


def test_an_image_of_the_right_size_is_not_changed(tmp_path: Path) -> None:
    loaded = read_image(saved(tmp_path / "a.png", noise()), COLOUR)
    assert torch.equal(loaded.pixels, exact(noise()))
    assert (loaded.pixels.dtype, loaded.note) == (torch.float32, "")


def test_central_keeps_the_right_size_and_crops_others_like_the_evaluation(tmp_path: Path) -> None:
    right = noise(224, 224)
    assert torch.equal(read_image(saved(tmp_path / "a.png", right), (3, 224, 224), central=True).pixels, exact(right))
    large = Image.fromarray(noise(300, 400))
    cropped = np.asarray(large.resize((224, 224), Image.Resampling.BILINEAR, centre_crop(400, 300)))
    loaded = read_image(saved(tmp_path / "b.png", large), (3, 224, 224), central=True)
    assert torch.equal(loaded.pixels, exact(cropped))
    assert loaded.note == "resized from 400 x 300"


def test_resized_keeps_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = noise()
    loaded = read_image(saved(tmp_path / "wide.png", wide), COLOUR)
    assert torch.equal(loaded.pixels, exact(noise()))
    assert loaded.note == "resized from 24 x 8"


def test_grey_image_for_colours_and_the_other_way_round(tmp_path: Path) -> None:
    grey = noise()[:, :, 0]
    path = saved(tmp_path / "grey.png", grey)
    assert torch.equal(read_image(path, GREY).pixels[0], torch.from_numpy(grey).float() / 255)
    assert read_image(path, GREY).note == ""
    coloured = read_image(path, COLOUR)
    assert torch.equal(coloured.pixels, torch.from_numpy(grey).float().div(255).expand(3, 8, 8))
    assert coloured.note == "grey"
    assert read_image(saved(tmp_path / "c.png", noise()), GREY).note == "colours dropped"


def test_transparency_is_dropped_and_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.png", np.dstack([noise(), noise(channels=1)]))
    assert torch.equal(read_image(path, COLOUR).pixels, exact(noise()))
    assert read_image(path, COLOUR).note == "transparency dropped"


def test_sixteen_bits_are_rounded_not_cut_off(tmp_path: Path) -> None:
    deep = noise(channels=1)[:, :, 0].astype(np.uint16) * 257
    deep[0, 0] = 257 * 100 + 128  # nearer to 100 than to 101, by half a step
    loaded = read_image(saved(tmp_path / "deep.png", deep), GREY)
    expected = noise(channels=1)[:, :, 0].astype(np.float32)
    expected[0, 0] = 100
    assert torch.equal(loaded.pixels[0], torch.from_numpy(expected) / 255)
    assert loaded.note == "16 bits a channel rounded to 8"


def deep_png(path: Path, levels: np.ndarray, kind: int) -> Path:
    """A PNG of 16 bits a channel, which Pillow does not write in colour: [H, W, channels] of PNG's colour type `kind`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_sixteen_bits_of_colour_are_cut_and_reported(tmp_path: Path) -> None:
    levels = noise().astype(np.uint16) * 256 + 255  # the lower 8 bits are what is lost
    loaded = read_image(deep_png(tmp_path / "deep.png", levels, kind=2), COLOUR)
    assert torch.equal(loaded.pixels, exact(noise()))
    assert loaded.note == "16 bits a channel cut to 8"
    clear = np.dstack([levels, levels[:, :, :1]])
    assert read_image(deep_png(tmp_path / "t.png", clear, kind=6), COLOUR).note == (
        "16 bits a channel cut to 8; transparency dropped"
    )
    grey = deep_png(tmp_path / "la.png", levels[:, :, :2], kind=4)
    assert read_image(grey, GREY).note == "16 bits a channel cut to 8; transparency dropped"
    assert read_image(grey, COLOUR).note.endswith("; grey")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("clear", [3, bytes([0, 128] + [255] * 254)], ids=["one colour", "by degrees"])
def test_a_palette_is_looked_up_and_its_transparency_dropped(tmp_path: Path, clear: Any) -> None:
    image = Image.fromarray(noise()).convert("P")
    expected = exact(np.asarray(image.convert("RGB")))
    assert read_image(saved(tmp_path / "p.png", image), COLOUR).note == ""
    loaded = read_image(saved(tmp_path / "t.png", image, transparency=clear), COLOUR)
    assert torch.equal(loaded.pixels, expected)
    assert loaded.note == "transparency dropped"


@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_first_frame_in_colour(tmp_path: Path, form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red")]
    lossless = {"lossless": True} if form == "webp" else {}
    path = saved(tmp_path / f"a.{form}", frames[0], save_all=True, append_images=frames[1:], **lossless)
    loaded = read_image(path, COLOUR)
    assert loaded.pixels.mean(dim=(1, 2)).tolist() == [0.0, 0.0, 1.0]
    assert loaded.note == "first of its frames"


def test_lab_is_an_image_in_colour(tmp_path: Path) -> None:
    path = saved(tmp_path / "lab.tiff", Image.new("LAB", (8, 8), (128, 128, 128)))
    assert read_image(path, COLOUR).note == "converted from LAB"
    assert read_image(path, GREY).note == "colours dropped; converted from LAB"


def test_first_frame_of_several(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (30, 200)]
    loaded = read_image(saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]), GREY)
    assert torch.equal(loaded.pixels, torch.full(GREY, 30 / 255))
    assert "first of its frames" in loaded.note


def test_cmyk(tmp_path: Path) -> None:
    loaded = read_image(saved(tmp_path / "c.jpg", Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK")), COLOUR)
    assert loaded.pixels[0].min() > 0.9
    assert loaded.pixels[1:].max() < 0.1
    assert loaded.note == "converted from CMYK"


def test_array_is_taken_as_it_is(tmp_path: Path) -> None:
    array = np.random.default_rng(1).random(COLOUR, dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    assert torch.equal(read_image(tmp_path / "a.npy", COLOUR).pixels, torch.from_numpy(array))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 8, 8)), "shape (1, 8, 8), values from 0 to 0; needed are floats in [0, 1] of shape (3, 8, 8)"),
        (np.full(COLOUR, 1.5), "values from 1.5 to 1.5; needed are floats in [0, 1]"),
        (np.full(COLOUR, np.nan), "needed are floats in [0, 1]"),
        (np.zeros(COLOUR, dtype=np.uint8), "uint8 of shape"),
        (np.array([{}], dtype=object), "not an array that can be read"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert message in error_line(tmp_path / "a.npy")


def error_line(path: Path) -> str:
    """The error of one line, which names the file."""
    text = refusal(read_image, path, COLOUR)
    assert text.startswith(str(path))
    return text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0\0\0\x18ftypheic" + bytes(64), "HEIC and AVIF images are not supported"),
        (b"hello", "not an image that can be decoded"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert message in error_line(tmp_path / "x.png")


def test_truncated_missing_and_oversized_files(tmp_path: Path) -> None:
    content = saved(tmp_path / "complete.png", noise(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:2000])
    assert "not an image that can be decoded" in error_line(tmp_path / "cut.png")
    assert "cannot be read (No such file" in error_line(tmp_path / "missing.png")
    (tmp_path / "folder").mkdir()
    assert "cannot be read (Is a directory)" in error_line(tmp_path / "folder")
    assert "pixels of kind F" in error_line(saved(tmp_path / "float.tiff", Image.new("F", (8, 8))))
    assert "more than 64,000,000 pixels" in error_line(saved(tmp_path / "huge.png", Image.new("1", (8001, 8000))))
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    assert "536,870,913 bytes; at most 536,870,912 are read" in error_line(tmp_path / "long.png")


def test_an_image_without_pixels_is_refused() -> None:
    assert refusal(fit_image, Image.new("RGB", (0, 4)), COLOUR, "here") == "here: the image has no pixels"
