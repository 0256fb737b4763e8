"""Streamed images: encoded files that stay on disk and are decoded when they are asked for.

Training: random resized crop and mirroring (Szegedy et al. 2015, the standard procedure for ImageNet), decoded by worker
processes ahead of the training step. Evaluation: shorter side to 256, centre crop of 224.
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
from advmoe.data.decode import check_size, decode_all, opened, rgb
from advmoe.data.images import Images, cores
from advmoe.errors import UserError

SIDE = 224
SHORTER_SIDE = 256
AREA = (0.08, 1.0)  # of a training crop, as a share of the image's
RATIO = (3 / 4, 4 / 3)  # of its width to its height
TRIES = 10
PIECE = 32  # images that a worker decodes at a time: small, so that all workers share the first batch

Box = tuple[float, float, float, float]  # left, top, right, bottom
Job = tuple[np.ndarray, int, int]  # rows, the first one's position in its batch, the batch's seed


class Entry(NamedTuple):
    """One encoded image: `name` is a path below the root, or PATH NUL MEMBER inside a tar archive; `modified` is when the file
    was written last, in nanoseconds since 1970."""

    name: str
    offset: int
    size: int
    label: int
    modified: int


@dataclass(frozen=True, eq=False)
class Files:
    """Where n encoded images lie, in flat arrays: 32 bytes an image and its name, nothing that workers would copy.

    (A list of a million str grows in every forked worker, because reading a str writes its reference count.)
    Name i is `text[ends[i - 1] : ends[i]]`; its image is `sizes[i]` bytes from `offsets[i]` of that file.
    """

    root: str
    text: np.ndarray  # uint8
    ends: np.ndarray  # [n] int64, as are the next three
    offsets: np.ndarray
    sizes: np.ndarray
    modified: np.ndarray  # nanoseconds since 1970

    def name(self, row: int) -> str:
        """The entry's name."""
        return os.fsdecode(self.text[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes())

    def where(self, row: int) -> str:
        """The image's place, for a message."""
        return os.path.join(self.root, self.name(row).replace("\0", ": "))

    def read(self, row: int) -> bytes:
        """The encoded image. Raises UserError where it is gone, shorter than it was, or its file was written since it was listed.

        The file's time is looked at once the bytes are read, so that nothing written meanwhile is missed.
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
            raise UserError(f"{self.where(row)}: holds {len(data)} bytes, not the {self.sizes[row]} that it had")
        if modified != self.modified[row]:
            now, then = np.datetime64(modified, "ns"), np.datetime64(int(self.modified[row]), "ns")
            raise UserError(f"{path}: was written at {now} UTC, not at {then} UTC: data must stay as they were when the run began")
        return data


def stream(root: str, entries: Iterable[Entry]) -> "Streamed":
    """Streamed images from a listing, which is consumed one by one."""
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
    """Some of the images in `files`, by their `rows` [n] int64 there; `labels` [n] int64, on the device they come to.

    Every method that decodes raises UserError, which names the file, where an image is damaged or gone.
    """

    files: Files
    rows: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        """The images of some rows, [k, 3, 224, 224], resized and cropped at the centre; decoded by threads."""
        rows = self.rows[index.cpu().numpy()]
        raw = decode_all(len(rows), SIDE, lambda place: _decoded(self.files, rows[place], centre_crop, shrink=False))
        return Images(torch.from_numpy(raw).to(self.labels.device), self.labels[index])

    def subset(self, index: Tensor) -> "Streamed":
        """Some rows of it, still on disk; takes 16 bytes an image."""
        return Streamed(self.files, self.rows[index.cpu().numpy()], self.labels[index])

    def to(self, device: torch.device) -> "Streamed":
        """The same images, to be put on `device` once decoded."""
        return replace(self, labels=self.labels.to(device))

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [n, 3, 224, 224]: 0.6 MB each, and 0.75 MB more while they are made.

        The 50,000 of ImageNet's validation set take 30 GB; a limited part takes its share.
        """
        return self[torch.arange(len(self))].pixels()

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator[Images]:
        """Batches of random resized crops, mirrored at random where `data.flip` says so; `crop_padding` plays no role.

        An image's crop depends on its batch's seed and its position there alone. `data.workers` processes decode, two
        batches ahead; they end with the iterator. One call for an epoch is cheap, one for each batch is not.
        """
        shares = [distributed.local_rows(len(whole)) for whole in rows]
        rows = [whole[share] for whole, share in zip(rows, shares, strict=True)]
        starts = [share.start for share in shares]
        jobs = [
            (own[at : at + PIECE], start + at, seed)
            for own, start, seed in zip(rows, starts, seeds, strict=True)
            for at in range(0, len(own), PIECE)
        ]
        ahead = 2 * -(-max(map(len, rows), default=0) // PIECE)
        device, pieces = self.labels.device, _pieces(self, jobs, ahead, data)
        try:
            for own in rows:
                raw = []
                for _ in range(0, len(own), PIECE):
                    piece = _arrived(pieces)
                    if isinstance(piece, str):
                        raise UserError(piece)
                    raw.append(piece.to(device, non_blocking=True))
                yield Images(_joined(raw), self.labels[torch.from_numpy(own).to(device)])
        finally:
            del pieces  # ends the workers even while an error's traceback holds this frame


def _pieces(images: Streamed, jobs: Sequence[Job], ahead: int, data: DataConfig) -> Iterator[Tensor | str]:
    """The jobs' crops in order, `ahead` of them decoded before they are asked for.

    Workers are started the way Python starts processes on this system. They compute with Pillow and numpy alone, and
    DataLoader gives each one torch thread: a forked worker never waits for threads that its parent had.
    """
    workers = max(1, min(data.workers or cores(), len(jobs)))
    return iter(
        DataLoader(
            _Crops(images.files, images.rows, data.flip), batch_size=None, sampler=jobs,
            num_workers=workers, prefetch_factor=max(1, -(-ahead // workers)), pin_memory=images.labels.is_cuda,
        )
    )  # fmt: skip


def _arrived(pieces: Iterator[Tensor | str]) -> Tensor | str:
    """The next crops, or the message of what is wrong; raising it is left to the caller, or the error would hold `pieces`."""
    try:
        return next(pieces)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        return f"a process that decodes images died ({error}); fewer data.workers take less memory"


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """One batch, on the pieces' device.

    In main memory numpy puts it together: torch asks for aligned blocks, which glibc before 2.38 does not use again once
    they are freed, so that an epoch would grow by every batch.
    """
    if pieces[0].device.type != "cpu":
        return torch.cat(list(pieces))
    return torch.from_numpy(np.concatenate([piece.numpy() for piece in pieces]))


@dataclass(frozen=True, eq=False)
class _Crops(Dataset[Tensor | str]):
    """What a worker does: a job to [k, 3, 224, 224] uint8, or to the message of what is wrong with its images."""

    files: Files
    rows: np.ndarray
    flip: bool

    def __getitem__(self, job: Job) -> Tensor | str:
        rows, first, seed = job
        raw = np.empty((len(rows), 3, SIDE, SIDE), dtype=np.uint8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on odd metadata
                for place, row in enumerate(self.rows[rows]):
                    raw[place] = self._crop(row, np.random.default_rng([seed, first + place]))
        except UserError as error:
            return str(error)
        return torch.from_numpy(raw)

    def _crop(self, row: int, random: np.random.Generator) -> np.ndarray:
        mirrored = random.random() < 0.5 and self.flip
        image = _decoded(self.files, row, lambda width, height: random_crop(width, height, random), shrink=True)
        return image[:, :, ::-1] if mirrored else image


# Crops


def random_crop(width: int, height: int, random: np.random.Generator) -> Box:
    """A box of 8 to 100 % of the area, 3:4 to 4:3 in shape; the largest central one of such a shape if 10 tries fit none."""
    for area, ratio, x, y in random.random((TRIES, 4)):
        wanted = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        across, down = round(math.sqrt(wanted * shape)), round(math.sqrt(wanted / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(x * (width - across + 1)), int(y * (height - down + 1))
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def centre_crop(width: int, height: int) -> Box:
    """The box that the central 224 x 224 come from once the shorter side is resized to 256."""
    scale = SHORTER_SIDE / min(width, height)
    resized = SHORTER_SIDE if width <= height else int(width * scale), SHORTER_SIDE if height <= width else int(height * scale)
    left, top = round((resized[0] - SIDE) / 2), round((resized[1] - SIDE) / 2)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + SIDE) * x, (top + SIDE) * y


# Pixels


def _decoded(files: Files, row: int, crop: Callable[[int, int], Box], *, shrink: bool) -> np.ndarray:
    """A crop of one image as [3, 224, 224] uint8."""
    return resized_crop(files.read(row), crop, files.where(row), shrink=shrink)


def resized_crop(data: bytes, crop: Callable[[int, int], Box], where: str, *, shrink: bool) -> np.ndarray:
    """The box that `crop(width, height)` gives of an encoded image, resized to [3, 224, 224] uint8 (bilinear, antialiased).

    With `shrink` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the box keeps at least 224 x 224 pixels: then
    no detail that the result could show is lost, and pixels differ by 0.3 of 255 on average from those of full decoding.
    An image of 2000 x 1500 takes about 0.4 of the time, one of 1000 x 750 two thirds; most of ImageNet's are too small to gain
    (`advmoe benchmark --suite streaming` measures this). Training alone shrinks: evaluation shows the pixels that everybody's does.
    Raises UserError, led by `where`.
    """
    with opened(data, where) as image:
        check_size(image, where)  # before a draft makes it look smaller: some JPEG are held whole all the same
        width, height = image.size
        box = crop(width, height)
        if shrink:
            across, down = box[2] - box[0], box[3] - box[1]
            drafted = image.draft(None, (math.ceil(width * SIDE / across), math.ceil(height * SIDE / down)))
            scale = drafted[1][2] / width if drafted else 1.0
            box = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
        return np.asarray(rgb(image, where).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)).transpose(2, 0, 1)
