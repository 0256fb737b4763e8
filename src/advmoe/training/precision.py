"""The number format of a run: float32, or bfloat16 by autocast."""

import torch
from torch.amp import is_autocast_available

from advmoe.config import Precision
from advmoe.errors import UserError


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype for torch.autocast: bfloat16, or None for float32. `auto` means bfloat16 if it is faster on `device`.

    Raises UserError if bfloat16 is requested and `device` does not support it.
    """
    if precision == "bfloat16" and not _has_bfloat16(device):
        raise UserError(f"precision: {device} has float32, not bfloat16")
    faster = precision == "auto" and _has_bfloat16(device) and _bfloat16_is_fast(device)
    return torch.bfloat16 if precision == "bfloat16" or faster else None


def _has_bfloat16(device: torch.device) -> bool:
    """Whether `device` can compute in bfloat16. CPUs can even without instructions for it; CUDA needs compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else is_autocast_available(device.type)


def _bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32. CPUs need AVX-512 BF16.

    There an AdvMoE iteration of ResNet-18 was 1.7 times as fast as in float32. The narrow network of the demo was equally fast in
    both (results/benchmarks/precision.json).
    """
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def in_precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context in which `device` computes in `dtype`; None is float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
