"""Streamed images: encoded files that stay on disk and are decoded when they are needed.

Training: random resized crop and horizontal flip (Szegedy et al. 2015, the standard procedure for ImageNet), decoded by worker
processes ahead of the training step. Evaluation: shorter side resized to 256, centre crop of 224.
"""

import math
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from advmoe import distributed
from advmoe.config import DataConfig
from advmoe.data.decode import check_size, decode_all, to_rgb, with_image
from advmoe.data.images import Images, cores
from advmoe.errors import UserError

SIDE = 224
SHORTER_SIDE = 256
AREA = (0.08, 1.0)  # of a training crop, as a share of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height of a training crop
TRIES = 10  # to draw a crop that fits
PIECE = 32  # images that a worker decodes at a time: few, so that all workers share the first batch

Box = tuple[float, float, float, float]  # left, top, right, bottom
Rows = tuple[np.ndarray, int, int]  # a job of a worker: rows, the position of the first row in its batch, the seed of the batch


class Entry(NamedTuple):
    """One encoded image: `name` is a path below the root, or PATH NUL MEMBER for a member of a tar archive; `modified` is the
    time of the last change of the file, in nanoseconds since 1970."""

    name: str
    offset: int
    size: int
    label: int
    modified: int


@dataclass(frozen=True, eq=False)
class Files:
    """The locations of n encoded images in flat arrays: 32 bytes an image and its name, none of which workers copy.

    (A list of a million str would be copied in every forked worker, because reading a str writes its reference count.)
    Name i is `text[ends[i - 1] : ends[i]]`; its image is `sizes[i]` bytes from `offsets[i]` of that file.
    """

    root: str
    text: np.ndarray  # uint8
    ends: np.ndarray  # [n] int64, as are the next three
    offsets: np.ndarray
    sizes: np.ndarray
    modified: np.ndarray  # nanoseconds since 1970

    def name(self, row: int) -> str:
        """The name of an entry."""
        return os.fsdecode(self.text[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes())

    def where(self, row: int) -> str:
        """The path of an image, for a message."""
        return os.path.join(self.root, self.name(row).replace("\0", ": "))

    def read(self, row: int) -> bytes:
        """The encoded image. Raises UserError if it is missing, shorter than it was, or its file has changed since it was listed.

        The time of the file is checked after the bytes are read, so that no change in between is missed.
        """
        path = os.path.join(self.root, self.name(row).partition("\0")[0])
        try:
            with open(path, "rb") as file:
                file.seek(self.offsets[row])
                data = file.read(self.sizes[row])
                modified = os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if len(data) < self.sizes[row]:
            raise UserError(f"{self.where(row)}: has {len(data)} bytes, it had {self.sizes[row]} when the run began")
        if modified != self.modified[row]:
            now, then = np.datetime64(modified, "ns"), np.datetime64(int(self.modified[row]), "ns")
            raise UserError(f"{path}: changed since the run began (modified at {now} UTC, before at {then} UTC)")
        return data


def stream(root: str, entries: Iterable[Entry]) -> "Streamed":
    """Streamed images from a listing, which is read one entry at a time."""
    text, numbers = bytearray(), tuple(array("q") for _ in range(5))
    for name, *rest in entries:
        text += os.fsencode(name)
        for column, value in zip(numbers, (len(text), *rest), strict=True):
            column.append(value)
    ends, offsets, sizes, labels, modified = (np.frombuffer(column, dtype=np.int64) for column in numbers)
    files = Files(root, np.frombuffer(text, dtype=np.uint8), ends, offsets, sizes, modified)
    return Streamed(files, np.arange(len(labels)), torch.from_numpy(labels.copy()))


@dataclass(frozen=True, eq=False)
class Streamed:
    """Some of the images in `files`: their `rows` [n] int64, and `labels` [n] int64 on the device that the images are moved to.

    Every method that decodes raises UserError, which names the file, if an image is damaged or missing.
    """

    files: Files
    rows: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        """The images of some rows, [k, 3, 224, 224], resized and cropped to the centre; decoded by threads."""
        rows = self.rows[index.cpu().numpy()]
        raw = decode_all(len(rows), SIDE, lambda row: _decode_crop(self.files, rows[row], centre_crop, shrink=False))
        return Images(torch.from_numpy(raw).to(self.labels.device), self.labels[index])

    def subset(self, index: Tensor) -> "Streamed":
        """Some of the rows, still on disk; takes 16 bytes an image."""
        return Streamed(self.files, self.rows[index.cpu().numpy()], self.labels[index])

    def to(self, device: torch.device) -> "Streamed":
        """The same images, to be moved to `device` when they are decoded."""
        return replace(self, labels=self.labels.to(device))

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [n, 3, 224, 224]: 0.6 MB each, and 0.15 MB more while they are decoded.

        The 50,000 images of ImageNet's validation set take 30 GB.
        """
        return self[torch.arange(len(self))].pixels()

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator[Images]:
        """Batches of random resized crops, flipped at random if `data.flip`; `data.crop_padding` is not used.

        The crop of an image depends on the seed of its batch and its position in the batch only. `data.workers` processes
        decode two batches ahead; they end with the iterator. Starting them takes time: call this once an epoch, not once a batch.
        """
        shares = [distributed.local_rows(len(batch)) for batch in rows]
        local_rows = [batch[share] for batch, share in zip(rows, shares, strict=True)]
        jobs = [
            (batch[start : start + PIECE], share.start + start, seed)
            for batch, share, seed in zip(local_rows, shares, seeds, strict=True)
            for start in range(0, len(batch), PIECE)
        ]
        ahead = 2 * -(-max(map(len, local_rows), default=0) // PIECE)
        device, pieces = self.labels.device, _decode_ahead(self, jobs, ahead, data)
        message = None
        try:
            for batch in local_rows:
                raw = []
                for _ in range(0, len(batch), PIECE):
                    piece = next(pieces)
                    if isinstance(piece, str):
                        raise UserError(piece)
                    raw.append(piece.to(device, non_blocking=True))
                yield Images(_concatenate(raw), self.labels[torch.from_numpy(batch).to(device)])
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            message = f"a process that decodes images died ({error}); fewer data.workers take less memory"
        finally:
            del pieces  # ends the workers, even while the traceback of an error refers to this frame
        if message is not None:  # raised outside the handler: as its context, the first error would keep the workers alive
            raise UserError(message)


def default_workers() -> int:
    """The processes that decode images: one for each CPU core, divided by the ranks that share the machine."""
    return max(1, cores() // distributed.local_world_size())


def _decode_ahead(images: Streamed, jobs: Sequence[Rows], ahead: int, data: DataConfig) -> Iterator[Tensor | str]:
    """The crops of each job in order, decoded up to `ahead` jobs before they are needed.

    Workers start by Python's default method on this system. They use Pillow and numpy only, and DataLoader gives each of them one
    torch thread, so a forked worker never waits for threads of its parent. It draws a seed for them, here from a separate
    generator: a draw from torch's global one would change dropout in a run that is resumed within an epoch.
    """
    workers = max(1, min(data.workers or default_workers(), len(jobs)))
    return iter(
        DataLoader(
            _Crops(images.files, images.rows, data.flip), batch_size=None, sampler=jobs,
            num_workers=workers, prefetch_factor=max(1, -(-ahead // workers)), pin_memory=images.labels.is_cuda,
            generator=torch.Generator(),
        )
    )  # fmt: skip


def _concatenate(pieces: Sequence[Tensor]) -> Tensor:
    """One batch, on the device of the pieces.

    In main memory this is done by numpy: torch allocates aligned blocks, which glibc before 2.38 does not reuse once they are
    freed, so that memory would grow with every batch of an epoch.
    """
    if pieces[0].device.type != "cpu":
        return torch.cat(list(pieces))
    return torch.from_numpy(np.concatenate([piece.numpy() for piece in pieces]))


@dataclass(frozen=True, eq=False)
class _Crops(Dataset[Tensor | str]):
    """The work of a worker: a job to [k, 3, 224, 224] uint8, or to the message of the error that an image raised."""

    files: Files
    rows: np.ndarray
    flip: bool

    def __getitem__(self, job: Rows) -> Tensor | str:
        rows, first, seed = job
        raw = np.empty((len(rows), 3, SIDE, SIDE), dtype=np.uint8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on odd metadata
                for position, row in enumerate(self.rows[rows]):
                    raw[position] = self._crop(row, np.random.default_rng([seed, first + position]))
        except UserError as error:
            return str(error)
        return torch.from_numpy(raw)

    def _crop(self, row: int, random: np.random.Generator) -> np.ndarray:
        flipped = random.random() < 0.5 and self.flip
        image = _decode_crop(self.files, row, lambda width, height: random_crop(width, height, random), shrink=True)
        return image[:, :, ::-1] if flipped else image


# Crops


def random_crop(width: int, height: int, random: np.random.Generator) -> Box:
    """A box of 8 to 100 % of the area and a shape from 3:4 to 4:3. The largest central one if none of 10 tries fits."""
    for area, ratio, x, y in random.random((TRIES, 4)):
        target_area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        crop_width, crop_height = round(math.sqrt(target_area * shape)), round(math.sqrt(target_area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def centre_crop(width: int, height: int) -> Box:
    """The box that becomes the central 224 x 224 pixels when the shorter side is resized to 256."""
    scale = SHORTER_SIDE / min(width, height)
    resized = SHORTER_SIDE if width <= height else int(width * scale), SHORTER_SIDE if height <= width else int(height * scale)
    left, top = round((resized[0] - SIDE) / 2), round((resized[1] - SIDE) / 2)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + SIDE) * x, (top + SIDE) * y


# Pixels


def _decode_crop(files: Files, row: int, crop: Callable[[int, int], Box], *, shrink: bool) -> np.ndarray:
    """A crop of one image as [3, 224, 224] uint8."""
    return resized_crop(files.read(row), crop, files.where(row), shrink=shrink)


def resized_crop(data: bytes, crop: Callable[[int, int], Box], where: str, *, shrink: bool) -> np.ndarray:
    """The box that `crop(width, height)` returns of an encoded image, resized to [3, 224, 224] uint8 (bilinear, antialiased).

    With `shrink` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box keeps at least 224 x 224 pixels: no detail that
    the result could show is lost, and pixels differ by 0.3 of 255 on average from those of full decoding. An image of
    2000 x 1500 takes about 0.4 of the time, one of 1000 x 750 two thirds; most of ImageNet's are too small to gain
    (`advmoe benchmark --suite streaming` measures this). Only training uses it: evaluation decodes images in full, as other
    programs do. Raises UserError, which starts with `where`.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        check_size(image, where)  # before draft() reduces the size: some JPEGs are decoded in full even so
        width, height = image.size
        box = crop(width, height)
        if shrink:
            crop_width, crop_height = box[2] - box[0], box[3] - box[1]
            draft = image.draft(None, (math.ceil(width * SIDE / crop_width), math.ceil(height * SIDE / crop_height)))
            scale = draft[1][2] / width if draft else 1.0
            box = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
        return np.asarray(to_rgb(image, where).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)).transpose(2, 0, 1)

    return with_image(data, where, pixels)
