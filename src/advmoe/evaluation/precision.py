"""The number format in which adversarial images are judged."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn


@contextmanager
def full_float32(model: nn.Module) -> Iterator[None]:
    """Inside the block, `model` runs in float32, without autocast and TF32, as the network that judges adversarial images must.

    Afterwards each setting of a backend has its value of before. It is then set explicitly, so a later change of
    `torch.backends.fp32_precision` no longer changes it.
    """
    device = next(iter(model.parameters()), torch.zeros(())).device
    with torch.autocast(device.type, enabled=False), _without_rounding():
        yield


@contextmanager
def _without_rounding() -> Iterator[None]:
    """Inside the block, convolutions and matrix products of float32 tensors are not rounded to TF32 or bfloat16."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    settings = [cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul]
    with ExitStack() as restored:
        for setting in settings:
            restored.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
        # The older interface agrees, so that a network may read it. It raises if the newer one has set what it cannot express.
        with suppress(RuntimeError):
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            restored.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
