"""Generated training images: a file of images and labels that a generative model made, mixed into every training batch.

Source: Gowal et al., "Improving robustness using generated data", NeurIPS 2021; the file's form is that of Wang et al., "Better
diffusion models further improve adversarial training", ICML 2023.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from advmoe.config import DataConfig
from advmoe.data.arrays import map_npz, open_npz
from advmoe.data.images import Images, ImageSpec, Splits
from advmoe.data.paths import os_errors_as_user_errors
from advmoe.errors import UserError

SAMPLE = 256  # images whose content goes into the digest
STREAM = 1  # the random numbers that choose generated images are not those that change them


@dataclass(frozen=True, eq=False)
class MixedImages(Images):
    """Images whose training batches are partly generated: the last `share` of each batch, at least one image and never all.

    `generated` [m, H, W, C] uint8 is mapped from its file, `generated_labels` [m] int64. An epoch has as many batches as without
    them. Which generated images a batch gets depends on its seed alone.
    """

    generated: np.ndarray = field(kw_only=True)
    generated_labels: np.ndarray = field(kw_only=True)
    share: float = field(kw_only=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the generated labels, and of the shape and SAMPLE images, evenly spread, of the generated images."""
        count = min(SAMPLE, len(self.generated))
        rows = np.arange(count) * len(self.generated) // count
        parts = (repr(self.generated.shape).encode(), self.generated_labels.tobytes(), self.generated[rows].tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def subset(self, index: torch.Tensor) -> "MixedImages":
        """Some of the original images, mixed with the same generated ones."""
        return replace(self, raw=self.raw[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "MixedImages":
        """The same images, the original ones on `device`."""
        return replace(self, raw=self.raw.to(device), labels=self.labels.to(device))

    def batch(self, rows: torch.Tensor, local: slice, seed: int) -> Images:
        """The images of the rows `local` of a batch, before they are augmented."""
        originals = super().batch(rows, local, seed)
        count = min(max(round(self.share * len(rows)), 1), len(rows) - 1)
        chosen = np.random.default_rng([seed, STREAM]).integers(0, len(self.generated), count)
        first = len(rows) - count  # the position of the first generated image in the batch of all ranks
        chosen = chosen[max(local.start - first, 0) : max(local.stop - first, 0)]
        original_count = len(originals) - len(chosen)
        raw = torch.from_numpy(np.ascontiguousarray(self.generated[chosen].transpose(0, 3, 1, 2))).to(originals.raw.device)
        labels = torch.from_numpy(self.generated_labels[chosen]).to(originals.raw.device)
        return Images(torch.cat([originals.raw[:original_count], raw]), torch.cat([originals.labels[:original_count], labels]))


def with_generated(splits: Splits, data: DataConfig) -> Splits:
    """The splits with the generated images of `data` in the training part; the same splits if it names none.

    Raises UserError if the file cannot be read, or if its images, types or labels are not those of the data set.
    """
    if data.generated is None:
        return splits
    if not isinstance(splits.train, Images):
        raise UserError(f"generated is for images in memory, not for {data.dataset}")
    path = Path(data.generated)
    with os_errors_as_user_errors(path):
        images = map_npz(path, "image")
        with open_npz(path) as arrays:
            labels = arrays["label"]
    _check(images, labels, splits.spec, path)
    raw, train_labels = splits.train.raw, splits.train.labels
    return replace(
        splits,
        train=MixedImages(
            raw, train_labels, generated=images, generated_labels=labels.astype(np.int64), share=data.generated_share
        ),
    )


def _check(images: np.ndarray, labels: np.ndarray, spec: ImageSpec, path: Path) -> None:
    channels, height, width = spec.shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        form = f"{images.dtype} of shape {images.shape}"
        raise UserError(f"{path}: image must be uint8 of shape (n, {height}, {width}, {channels}), not {form}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: label must be integers of shape ({len(images)},), not {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(spec.classes):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(spec.classes)))[0])
        raise UserError(f"{path}: label {labels[row]} in row {row} is not a whole number from 0 to {len(spec.classes) - 1}")
