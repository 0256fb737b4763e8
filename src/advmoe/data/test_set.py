"""Other test sets for a trained network: arrays of images and labels (CIFAR-10.1), corrupted images (CIFAR-10-C), class folders."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advmoe.config import DataConfig
from advmoe.data.arrays import open_npz, read_npy
from advmoe.data.decode import stored_size
from advmoe.data.images import Images, ImageSpec, Splits, balanced, fingerprint, from_arrays, images_of_arrays, limit
from advmoe.data.paths import class_folders, os_errors_as_user_errors, visible_entries
from advmoe.data.single import is_central, read_image
from advmoe.errors import UserError, nearest, printable

SEVERITIES = 5
LABELS = "labels.npy"  # beside the arrays of CIFAR-10-C
PAIRS = (("image", "label"), ("images", "labels"), ("data", "labels"), ("x", "y"), ("x_test", "y_test"))  # names in an .npz file
FORMS = (
    "CLASS/ folders of images, NAME_data.npy beside NAME_labels.npy, an .npz with images and labels, "
    "or a folder of corruptions with --corruption and --severity"
)


@dataclass(frozen=True)
class ExtraTestSet:
    """The images at `path`; of a folder of corruptions (Hendrycks and Dietterich, 2019) those of one `corruption`, with its
    `severity` from 1 to 5. Raises UserError for another severity."""

    path: Path
    corruption: str | None = None
    severity: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.severity <= SEVERITIES:
            raise UserError(f"severity must be 1 to {SEVERITIES}, not {self.severity}")

    @property
    def name(self) -> str:
        """'cifar10.1_v6', 'CIFAR-10-C-fog-3': the name of the file or folder, and the corruption."""
        path = self.path.resolve()
        name = path.stem.removesuffix("_data") if path.is_file() else path.name
        return printable(name if self.corruption is None else f"{name}-{self.corruption}-{self.severity}")

    def load(self, spec: ImageSpec, config: DataConfig) -> Splits:
        """The test set for a network that takes images of `spec` and was trained on the data that `config` names. The splits for
        training and validation are empty.

        At most `limit_test` images are kept, balanced over the classes. Image files of another size are resized if those of the
        training data were. Raises UserError, with the path, if something is missing or damaged, or has other classes or
        another size.
        """
        with os_errors_as_user_errors(self.path):
            test = self._images(spec, config)
        empty = test[torch.arange(0)]
        return Splits(self.name, spec, fingerprint(test), empty, empty, test)

    def _images(self, spec: ImageSpec, config: DataConfig) -> Images:
        path = self.path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if self.corruption is not None:
            return self._corrupted(self.corruption, spec, config)
        if path.is_file():
            return limit(_array_file(path, spec), config.limit_test)
        if (path / LABELS).is_file():
            raise UserError(f"{path}: holds several corruptions; choose one by --corruption and --severity")
        arrays = sorted([*path.glob("*_data.npy"), *path.glob("*.npz")])
        if len(arrays) > 1:
            raise UserError(f"{path}: holds several test sets; give one of {', '.join(file.name for file in arrays[:5])}")
        return limit(_array_file(arrays[0], spec), config.limit_test) if arrays else _class_folders(path, spec, config)

    def _corrupted(self, corruption: str, spec: ImageSpec, config: DataConfig) -> Images:
        """The images in CORRUPTION/SEVERITY/CLASS/, or a fifth of those in CORRUPTION.npy, which has the severities in order."""
        folders = {folder.parent.name: folder for folder in self.path.glob(f"*/{self.severity}") if folder.is_dir()}
        files = {file.stem: file for file in self.path.glob("*.npy") if file.name != LABELS}
        if corruption in folders:
            return _class_folders(folders[corruption], spec, config)
        if corruption not in files:
            names = [*folders, *files]
            reason = f": {nearest(corruption, names)}" if names else f"; needed are {FORMS}"
            raise UserError(f"{self.path}: has no corruption '{corruption}'{reason}")
        images = _with_labels(files[corruption], self.path / LABELS, spec)
        if len(images) % SEVERITIES:
            raise UserError(f"{files[corruption]}: {len(images)} images are not {SEVERITIES} severities of equal size")
        size = len(images) // SEVERITIES
        return limit(images[torch.arange((self.severity - 1) * size, self.severity * size)], config.limit_test)


def _with_labels(path: Path, labels: Path, spec: ImageSpec) -> Images:
    if not labels.is_file():
        raise UserError(f"{path}: has no labels; needed is {labels.name} beside it")
    return images_of_arrays(read_npy(path), read_npy(labels), spec, str(path), str(labels))


def _array_file(path: Path, spec: ImageSpec) -> Images:
    if path.suffix == ".npy":
        if (path.parent / LABELS).is_file():
            raise UserError(f"{path}: give its folder, with --corruption {path.stem} and --severity")
        return _with_labels(path, path.with_name(f"{path.stem.removesuffix('_data')}_{LABELS}"), spec)
    if path.suffix != ".npz":
        raise UserError(f"{path}: not a test set that can be read; needed are {FORMS}")
    with open_npz(path) as arrays:
        pair = next((pair for pair in PAIRS if set(pair) <= set(arrays.names)), None)
        if pair is None:
            raise UserError(f"{path}: has no images and labels, but {', '.join(arrays.names[:5]) or 'nothing'}")
        return images_of_arrays(arrays[pair[0]], arrays[pair[1]], spec, f"{path}: {pair[0]}", f"{path}: {pair[1]}")


def _class_folders(path: Path, spec: ImageSpec, config: DataConfig) -> Images:
    folders = class_folders(entry for entry in visible_entries(path) if entry.is_dir())
    if not folders:
        raise UserError(f"{path}: not a test set that can be read; needed are {FORMS}")
    for name in sorted(folders.keys() ^ set(spec.classes)):
        reason = "is no class of the network" if name in folders else "is a class of the network that has no folder"
        raise UserError(f"{path}: {name} {reason}; the test set must have the same classes")
    files = [(label, file) for label, name in enumerate(spec.classes) for file in visible_entries(folders[name])]
    if not files:
        raise UserError(f"{path}: its class folders contain no image")
    labels = torch.tensor([label for label, _ in files])
    rows = balanced(labels, len(files) if config.limit_test is None else config.limit_test)
    raw = np.stack([_image(files[row][1], spec, config) for row in rows.tolist()])
    return from_arrays(raw, labels[rows].tolist(), len(spec.classes), str(path))


def _image(path: Path, spec: ImageSpec, config: DataConfig) -> np.ndarray:
    """[C, H, W] uint8, resized as the training images were."""
    central, (_, height, width) = is_central(config.dataset), spec.shape
    if not central and config.image_size is None and (size := stored_size(path.read_bytes(), str(path))) != (width, height):
        raise UserError(f"{path}: the image is {size[0]} x {size[1]}, those of the network are {width} x {height}")
    return read_image(path, spec.shape, central=central).pixels.mul(255).round().byte().numpy()
