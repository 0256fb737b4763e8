"""A loaded network: images of any kind, and a Record that belongs to its weights."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize, prune

import advmoe
from advmoe.data import ImageSpec, Splits
from advmoe.data.single import read_image
from advmoe.errors import UserError
from advmoe.evaluation.record_file import write_record
from advmoe.evaluation.target import EvaluationOptions
from advmoe.runs.evaluate import evaluate_folder
from advmoe.runs.load import load, save_file
from advmoe.runs.loaded import Loaded
from advmoe.training.loop import train
from advmoe.training.start import network

SPEC = ImageSpec(("bag", "boot", "coat"), (3, 8, 8), (0.4,) * 3, (0.3,) * 3)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Loaded:
    return advmoe.Loaded(network(tiny(), SPEC), tiny(), SPEC)


@pytest.fixture(scope="module")
def evaluated(tiny: Any, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, config = tmp_path_factory.mktemp("runs") / "run", tiny(epochs=1)
    train(config, splits, path)
    write_record(path / "record.json", evaluate_folder(path, config, splits, EvaluationOptions(0.1, preset=("pgd_10",))))
    return path


def photo(width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_path_a_pil_image_an_array_and_a_tensor_give_the_same_image(model: Loaded, tmp_path: Path) -> None:
    image = photo()
    image.save(tmp_path / "x.png")
    array = np.asarray(image).transpose(2, 0, 1) / 255
    forms = (tmp_path / "x.png", str(tmp_path / "x.png"), image, array, torch.tensor(array), torch.tensor(array)[None].float())
    predictions = [model.predict(form) for form in forms]
    assert len({(prediction.name, prediction.pathway) for prediction in predictions}) == 1
    assert predictions[0].name in SPEC.classes
    assert len(predictions[0].pathway) == len(model.network.moe_layers())
    for form in forms:
        torch.testing.assert_close(model.preprocess(form), torch.tensor(array)[None].float(), rtol=0, atol=1e-6)
    logits = model(model.preprocess(image))
    assert predictions[0].confidence == pytest.approx(logits.softmax(dim=1).max().item(), abs=1e-6)


def test_images_of_other_sizes_and_colours_are_fitted_in_every_form(model: Loaded, tmp_path: Path) -> None:
    """Files are read as `advmoe predict` reads them; the pixels alone give the same."""
    for number, image in enumerate((photo(20, 11), photo(20, 11).convert("L"), photo(20, 11).convert("RGBA"))):
        image.save(tmp_path / f"{number}.png")
        expected, pixels = model.preprocess(tmp_path / f"{number}.png"), np.array(image)
        channels_first = torch.tensor(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        assert expected.shape == (1, 3, 8, 8)
        for form in (image, pixels, channels_first):
            assert torch.equal(model.preprocess(form), expected)
    assert torch.equal(model.preprocess(np.zeros((9, 9, 1), np.uint8)), torch.zeros(1, 3, 8, 8))


def test_arrays_of_every_memory_layout_and_byte_order_are_taken(model: Loaded) -> None:
    array = np.random.default_rng(0).random((3, 8, 8))
    expected = torch.tensor(array)[None].float()
    for form in (array[:, :, ::-1].copy()[:, :, ::-1], array.astype(">f8"), np.asfortranarray(array), array.astype(np.longdouble)):
        assert torch.equal(model.preprocess(form), expected)
    with pytest.raises(UserError, match="not >i4 of shape"):
        model.preprocess(array.astype(">i4"))


@pytest.mark.parametrize(("dataset", "central"), [("imagenet", True), ("cifar10", False)])
def test_images_are_cropped_as_in_the_evaluation_on_the_data_set(tiny: Any, tmp_path: Path, dataset: str, central: bool) -> None:
    config, path = tiny(dataset=dataset), tmp_path / "x.png"
    photo(20, 11).save(path)
    model, expected = advmoe.Loaded(network(config, SPEC), config, SPEC), read_image(path, SPEC.shape, central=central).pixels
    assert torch.equal(model.read(path).pixels, expected)
    assert torch.equal(model.preprocess(photo(20, 11))[0], expected)
    assert not torch.equal(read_image(path, SPEC.shape, central=not central).pixels, expected)


def test_a_photo_that_its_camera_stored_sideways_is_turned_upright(model: Loaded, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    assert torch.equal(model.preprocess(tmp_path / "sideways.png"), model.preprocess(photo()))
    with Image.open(tmp_path / "sideways.png") as opened:
        assert torch.equal(model.preprocess(opened), model.preprocess(photo()))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.int64), "not torch.int64 of shape (3, 8, 8)"),
        (np.zeros((3, 8, 8), dtype=np.int64), "not int64 of shape (3, 8, 8)"),
        (255 * torch.ones(3, 8, 8), "not values from 255 to 255"),
        (torch.full((3, 8, 8), float("nan")), "not values from nan to nan"),
        (torch.zeros(8, 8, 3), "uint8 [C, H, W], or floats in [0, 1] of shape (3, 8, 8), not torch.float32 of shape (8, 8, 3)"),
        (np.zeros((8, 8, 3)), "uint8 [H, W, C], or floats in [0, 1] of shape (3, 8, 8), not float64 of shape (8, 8, 3)"),
        (torch.zeros(2, 3, 8, 8), "of shape (2, 3, 8, 8)"),
        ([[0.5]], "not list"),
    ],
)
def test_pixels_that_are_no_floats_in_0_to_1_are_refused(model: Loaded, image: Any, reason: str) -> None:
    for call in (model.predict, model.preprocess):
        with pytest.raises(UserError, match="floats in \\[0, 1\\] of shape \\(3, 8, 8\\)") as caught:
            call(image)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), torch.zeros(8, 8, 2).byte()]
)
def test_8_bit_pixels_of_no_image_are_refused(model: Loaded, image: Any) -> None:
    with pytest.raises(UserError, match=r"^uint8 pixels must be \[H, W\] or .* of 1, 3 or 4 channels, not of shape ") as caught:
        model.predict(image)
    assert str(tuple(image.shape)) in str(caught.value)


def test_an_image_that_is_cut_short_is_refused(model: Loaded, tmp_path: Path) -> None:
    photo(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    with Image.open(io.BytesIO(data[: len(data) // 2])) as image, pytest.raises(UserError, match=r"^image: cannot be decoded \("):
        model.predict(image)


def test_no_class_is_named_for_logits_that_are_not_finite(tiny: Any) -> None:
    model = advmoe.Loaded(network(tiny(), SPEC), tiny(), SPEC)
    for value in (torch.nan, torch.inf):
        torch.nn.init.constant_(model.network.classifier.bias, value)
        with pytest.raises(UserError, match=r"^the network returns NaN or infinity"):
            model.predict(photo())


def test_a_batch_of_another_shape_is_refused(model: Loaded) -> None:
    for shape in ((2, 1, 8, 8), (3, 8, 8)):
        for call in (model, model.forward_routed, model.predict_batch):
            with pytest.raises(UserError, match=r"^images must be a batch \[B, 3, H, W\], not of shape ") as caught:
                call(torch.rand(shape))
            assert str(shape) in str(caught.value)


def test_a_file_that_is_no_image_is_refused(model: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.png: "):
        model.predict(tmp_path / "nowhere.png")


def test_the_record_is_dropped_when_the_weights_change(evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(evaluated)
    assert model.record is not None
    save_file(model, tmp_path / "same.safetensors")
    assert load(tmp_path / "same.safetensors").record is not None
    assert caplog.messages == []
    with torch.no_grad():
        next(model.network.parameters()).mul_(0.5)
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        save_file(model, tmp_path / "changed.safetensors")
    assert "written without the Record" in caplog.messages[0]
    assert load(tmp_path / "changed.safetensors").record is None


def test_computed_weights_are_saved_as_plain_ones(evaluated: Path, tmp_path: Path) -> None:
    model = load(evaluated)
    parametrize.register_parametrization(model.network.classifier, "weight", nn.Identity())
    save_file(model, tmp_path / "same.safetensors")
    assert load(tmp_path / "same.safetensors").record is not None
    prune.l1_unstructured(model.network.classifier, "bias", 0.5)
    save_file(model, tmp_path / "pruned.safetensors")
    loaded, x = load(tmp_path / "pruned.safetensors"), torch.rand(4, *model.input_size)
    assert torch.equal(loaded(x), model(x))
    assert loaded.record is None  # other weights
    assert prune.is_pruned(model.network.classifier)  # the network itself does not change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: (255 * x).to(torch.uint8),
            r"floats in \[0, 1\]; model.predict and model.preprocess take .*, such as torch.uint8",
        ),
        (lambda x: x.numpy(), "such as ndarray"),
        (lambda x: 255 * x, r"floats in \[0, 1\]; .*; these have values up to 25"),
    ],
)
def test_a_batch_of_other_values_than_pixels_is_refused(model: Loaded, change: Any, message: str) -> None:
    x = torch.rand(4, *SPEC.shape)
    x[0, 0, 0, 0] = 0.999
    model(x)
    for call in (model, model.forward_routed, model.predict_batch):
        with pytest.raises(UserError, match=message):
            call(change(x))
    model(x + torch.randn(x.shape))  # noise, as for smoothing
    assert torch.func.vmap(lambda image: model(image[None])[0])(x).shape == (4, len(SPEC.classes))


def test_a_record_of_other_weights_is_dropped_on_loading(evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(evaluated)
    with torch.no_grad():
        next(model.network.parameters()).mul_(0.5)
    other = Loaded(model.network, model.config, model.spec, model.epoch, model.record)  # the caller's Record is not checked
    save_file(other, tmp_path / "other.safetensors")
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        assert load(tmp_path / "other.safetensors").record is None
    assert "its Record is of other weights and is left out" in caplog.messages[0]


def test_a_network_built_by_hand_is_saved_as_a_loaded_one(model: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save_file takes .*advmoe.Loaded\(network, config, spec\)"):
        save_file(model.network, tmp_path / "x.safetensors")  # type: ignore[arg-type]
    save_file(model, tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors")
    x = torch.rand(4, *SPEC.shape)
    assert torch.equal(loaded(x), model(x))
    assert (loaded.record, loaded.epoch, loaded.classes) == (None, 0, SPEC.classes)
