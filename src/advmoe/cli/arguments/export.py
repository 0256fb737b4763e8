"""The arguments of `advmoe export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from advmoe.cli.parsing import Flag
from advmoe.config.choices import Dtype
from advmoe.errors import UserError


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained network as one file for other programs, and compare it with PyTorch.

    The file maps pixels in [0, 1] of shape [batch, C, H, W] to logits and routes. Normalisation and routers are part of it.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a file written by advmoe.save_file, a network of the package (advmoe models), or a name on the hub
    (owner/name)."""
    out: Path
    """File to write. Its suffix gives the format: .onnx, or .pt2 for torch.export."""
    format: Literal["onnx", "torch-export"] | None = None
    """Format of a file with another suffix: ONNX, or torch.export's own."""
    dtype: Dtype = "float32"
    """Data type of the convolutions: bfloat16 for torch-export, or int8 for ONNX, calibrated on training images. Routers and logits
    stay float32; the effect on classes, routes and accuracy is printed."""
    check: int = 1000
    """Compare with PyTorch on this many test images, in batches of 1, 7 and 64; 0 skips the comparison."""
    data_dir: str | None = None
    """File or folder of the data, if it is no longer where it was during training."""
    json: Flag = False
    """Print the comparison as JSON."""

    def __post_init__(self) -> None:
        if self.check < 0:
            raise UserError(f"check must be at least 0, not {self.check}")
