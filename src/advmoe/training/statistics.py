"""The running statistics of batch norms and routers, where they are not simply tracked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from advmoe.config import RunConfig
from advmoe.data import Source
from advmoe.models import Classifier
from advmoe.moe.norm import recomputed_statistics
from advmoe.training.batches import epoch_order

CALIBRATION_BATCHES = 8  # at most 1 / advmoe.moe.MOMENTUM, up to which a router's running statistics are plain means


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Undo what the passes inside the block change in the buffers of `model`."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.data.copy_(value)  # data: autograd saved the buffers, although the backward pass in train mode does not use them


def calibrate(model: Classifier, config: RunConfig, images: Source) -> None:
    """Set the running statistics of routers and batch norms to means over up to eight random batches of training images.

    The images are not augmented. Routers standardise what the batch norms return in eval mode, so both must be equally up to date.
    With the momentum of batch norm a new router would send all images to one expert.
    """
    _recompute_statistics([model], model, config, images)


def calibrate_routers(model: Classifier, config: RunConfig, images: Source) -> None:
    """Set the running statistics of routers, and of a network router's batch norms, to means as `calibrate` does.

    The batch norms of the backbone stay as they are. Padded and shifted crops have other means over the image than the images that
    the network is used for, so routers that track augmented images take other routes for plain ones.
    """
    _recompute_statistics(model.routers(), model, config, images)


@torch.inference_mode()
def _recompute_statistics(parts: Sequence[nn.Module], model: Classifier, config: RunConfig, images: Source) -> None:
    """Set the running statistics of these parts of a network to means over up to eight random batches of training images."""
    size = config.training.batch_size
    (order,) = epoch_order(config.seed, 0, 1, len(images), size)
    model.eval()
    for part in parts:
        part.train()
    with recomputed_statistics(module for part in parts for module in part.modules()):
        for start in range(0, min(len(order), CALIBRATION_BATCHES * size), size):
            rows = torch.from_numpy(order[start : start + size]).to(images.labels.device)
            model(images[rows].pixels())
    model.eval()
