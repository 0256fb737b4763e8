"""Load the teacher of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from advmoe.config import RunConfig
from advmoe.data import Images, ImageSpec, Splits
from advmoe.errors import UserError
from advmoe.models import fused
from advmoe.models.digest import weights_digest
from advmoe.training.distill import Teacher
from advmoe.training.precision import autocast_dtype
from advmoe.training.saved import saved_file, saved_run

PIECE = 512  # images that the teacher sees at once


def load_teacher(config: RunConfig, splits: Splits) -> Teacher | None:
    """The teacher that the configuration names, on the device of the data; None if it names none.

    It computes in bfloat16 if that is faster. Raises UserError if it cannot be loaded, or if its classes or images differ.
    """
    if config.training.teacher is None:
        return None
    path = Path(config.training.teacher)
    if not path.exists():
        raise UserError(f"teacher {path}: no such run's folder or file")
    saved = (saved_run(path) if path.is_dir() else saved_file(path))[0]
    _check_fit(path, saved.spec, splits.spec)
    device = splits.train.labels.device
    network = fused(saved.network.to(device).requires_grad_(False))
    teacher = Teacher(network, weights_digest(saved.network), autocast_dtype("auto", device))
    return replace(teacher, precomputed=_precomputed(teacher, splits.train)) if _is_unchanged(config, splits) else teacher


def _check_fit(path: Path, teacher: ImageSpec, data: ImageSpec) -> None:
    if len(teacher.classes) != len(data.classes):
        raise UserError(f"teacher {path}: has {len(teacher.classes)} classes, the data {len(data.classes)}")
    mismatch = next((pair for pair in zip(teacher.classes, data.classes, strict=True) if pair[0] != pair[1]), None)
    if mismatch is not None:
        raise UserError(f"teacher {path}: has the class '{mismatch[0]}' where the data has '{mismatch[1]}'")
    if teacher.shape != data.shape:
        raise UserError(f"teacher {path}: takes images of shape {teacher.shape}, the data has {data.shape}")


def _is_unchanged(config: RunConfig, splits: Splits) -> bool:
    """Whether training sees the images exactly as they are, in every epoch."""
    data = config.data
    plain = data.augment == "crop_flip" and data.crop_padding == 0 and not data.flip
    return plain and type(splits.train) is Images


def _precomputed(teacher: Teacher, images: Any) -> torch.Tensor:
    rows = torch.arange(len(images), device=images.labels.device)
    return torch.cat([teacher.probabilities(images[piece].pixels()) for piece in rows.split(PIECE)])
