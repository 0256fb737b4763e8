"""A trained network in use: logits, routes, predictions for images of any kind."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn

from advmoe.attacks import Norm
from advmoe.attacks.surrogate import route_of
from advmoe.config import RunConfig
from advmoe.data import ImageSpec
from advmoe.data.single import LoadedImage, fit_image, is_central, read_image
from advmoe.errors import UserError, reason_of
from advmoe.evaluation.record import Record
from advmoe.models import Classifier
from advmoe.models.digest import weights_digest
from advmoe.moe import HARD, Gate, Routings
from advmoe.moe.copies import with_plain_weights
from advmoe.moe.guards import in_transform
from advmoe.moved import getter

MAX_PIXEL = 16.0  # a value that is no pixel in [0, 1], not even with much noise

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


class ThreatModel(NamedTuple):
    """The ball that a network was trained to withstand; `epsilon` in pixels of [0, 1]."""

    norm: Norm
    epsilon: float


class Prediction(NamedTuple):
    """`confidence` is the softmax probability of class `name`; `pathway` the expert chosen in each layer, () without experts."""

    name: str
    confidence: float
    pathway: tuple[int, ...]


class Loaded(nn.Module):
    """A trained network in eval mode: pixels [B, C, H, W] in [0, 1] -> logits [B, classes].

    `classes` are the names of its outputs, `input_size` is (C, H, W), `threat_model` the ball that it was trained for, `config` the
    run's configuration, `epoch` the run's best, `record` the Record of this epoch, or None if it was not evaluated.
    """

    def __init__(
        self, network: Classifier, config: RunConfig, spec: ImageSpec, epoch: int = 0, record: Record | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.config, self.spec, self.epoch, self.record = config, spec, epoch, record
        self.classes, self.input_size = spec.classes, spec.shape
        self.threat_model = ThreatModel("Linf", config.attack.epsilon)
        self._recorded = None if record is None else weights_digest(network)
        self._values_checked = False
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes], through the hard gate. Raises UserError if `x` is not floats, not a batch, or clearly not pixels in
        [0, 1]."""
        self._check_pixels(x)
        logits: Tensor = self.network(x)
        return logits

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and one Routing for each choice, as `Classifier.forward_routed` gives them."""
        self._check_pixels(x)
        return self.network.forward_routed(x, gate)

    def read(self, path: Path) -> LoadedImage:
        """The image in a file as this network takes it, resized and cropped. Raises UserError if there is none."""
        return read_image(path, self.input_size, central=is_central(self.config.data.dataset))

    def preprocess(self, image: ImageLike) -> Tensor:
        """One image as this network takes it: [1, C, H, W] float32 in [0, 1], on the network's device.

        A path, a PIL image or 8-bit pixels are turned upright, resized and cropped as `advmoe predict` does. 8-bit pixels are a
        uint8 array [H, W] or [H, W, C], or a uint8 tensor [H, W] or [C, H, W], of 1, 3 (RGB) or 4 (RGBA) channels. Floats are the
        input itself, and are not resized: an array or a tensor [C, H, W] or [1, C, H, W] in [0, 1]. Raises UserError otherwise.
        """
        central = is_central(self.config.data.dataset)
        if isinstance(image, str | Path):
            pixels = self.read(Path(image)).pixels
        elif isinstance(image, Image.Image):
            try:
                pixels = fit_image(image, self.input_size, "image", central=central).pixels
            except UserError:
                raise
            except Exception as error:  # a damaged image can raise nearly any exception
                raise UserError(f"image: cannot be decoded ({reason_of(error)})") from None
        elif isinstance(image, np.ndarray | Tensor) and image.dtype in (np.uint8, torch.uint8):
            pixels = fit_image(_photo(image), self.input_size, "image", central=central).pixels
        else:
            pixels = self._checked(image)
        return pixels[None].to(next(self.parameters()).device)

    def predict(self, image: ImageLike) -> Prediction:
        """Class, confidence and pathway of one image, given as `preprocess` takes it."""
        return self.predict_batch(self.preprocess(image))[0]

    @torch.inference_mode()
    def predict_batch(self, x: Tensor) -> list[Prediction]:
        """Class, confidence and pathway of each of the images [B, C, H, W], which have values in [0, 1].

        Raises UserError if a logit is not finite.
        """
        self._check_pixels(x)
        logits, routings = self.forward_routed(x.to(next(self.parameters()).dtype))
        if not bool(logits.isfinite().all()):
            raise UserError("the network returns NaN or infinity: it may be damaged, or have overflowed in its dtype")
        confidences, numbers = logits.float().softmax(dim=1).max(dim=1)
        routes = route_of(routings).tolist() if routings else [[]] * len(x)
        rows = zip(numbers.tolist(), confidences.tolist(), routes, strict=True)
        return [Prediction(self.classes[number], confidence, tuple(route)) for number, confidence, route in rows]

    def weights_changed(self) -> bool:
        """Whether the weights are no longer those that the Record was measured on. Weights that pruning or a parametrization
        computes count with their value."""
        return self._recorded is not None and self._recorded != weights_digest(with_plain_weights(self.network))

    def _check_pixels(self, x: Tensor) -> None:
        """Raises UserError if `x` is not a tensor of floats, not a batch of images, or has values far outside [0, 1].

        On CUDA and the like, values are checked until one batch passes, because a check waits for the device. Noise around an image
        may leave [0, 1].
        """
        advice = "pixels must be floats in [0, 1]; model.predict and model.preprocess take images of other kinds"
        if isinstance(x, fx.Proxy):  # the MoE layers refuse it
            return
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise UserError(f"{advice}, such as {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform()  # type: ignore[attr-defined, no-untyped-call]
        channels = self.input_size[0]
        if not tracing and (x.ndim != 4 or x.shape[1] != channels):  # one channel would be broadcast by the normalisation
            raise UserError(f"images must be a batch [B, {channels}, H, W], not of shape {tuple(x.shape)}")
        checked = self._values_checked and x.device.type != "cpu"
        if checked or tracing or type(x) is not Tensor or x.is_meta or x.numel() == 0:
            return
        largest = x.detach().abs().max().item()
        if largest > MAX_PIXEL:
            raise UserError(f"{advice}; these have values up to {largest:g}")
        self._values_checked = True

    def _checked(self, image: np.ndarray | Tensor) -> Tensor:
        """[C, H, W] float32. Raises UserError unless it holds floats in [0, 1] of the input's shape."""
        layout = "[C, H, W]" if isinstance(image, Tensor) else "[H, W, C]"
        expected_form = f"uint8 {layout}, or floats in [0, 1] of shape {self.input_size}"
        if not isinstance(image, np.ndarray | Tensor):
            raise UserError(
                f"an image must be a path, a PIL image, or an array or tensor of {expected_form}, not {type(image).__name__}"
            )
        is_float = image.is_floating_point() if isinstance(image, Tensor) else image.dtype.kind == "f"
        if not is_float or tuple(image.shape) not in (self.input_size, (1, *self.input_size)):
            raise UserError(f"pixels must be {expected_form}, not {image.dtype} of shape {tuple(image.shape)}")
        if isinstance(image, np.ndarray):  # in the byte order and memory layout that torch takes
            image = torch.from_numpy(image.astype(np.float64, order="C"))
        pixels = image.reshape(self.input_size)
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UserError(f"pixels must be {expected_form}, not values from {pixels.min().item():g} to {pixels.max().item():g}")
        return pixels.float()


def _photo(image: np.ndarray | Tensor) -> Image.Image:
    """uint8 pixels as a PIL image: an array [H, W] or [H, W, C], a tensor [H, W] or [C, H, W]. Raises UserError on other shapes."""
    array = np.moveaxis(image.cpu().numpy(), 0, -1) if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        form = "[C, H, W]" if isinstance(image, Tensor) else "[H, W, C]"
        raise UserError(f"uint8 pixels must be [H, W] or {form} of 1, 3 or 4 channels, not of shape {tuple(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


if not TYPE_CHECKING:
    __getattr__ = getter(__name__)
