"""A trained network as one file for other programs: ONNX, or torch.export's own format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from advmoe.config.choices import Dtype
from advmoe.data import Splits
from advmoe.data.images import balanced
from advmoe.errors import UserError, lookup
from advmoe.export.compare import BATCHES, Agreement, Comparison, Outputs, Predictor, agreement, compare, outputs
from advmoe.export.int8 import write_int8
from advmoe.export.onnx import check_extra, onnx_predictor, write_onnx
from advmoe.export.program import program_predictor, write_program
from advmoe.export.traceable import traced
from advmoe.models import Classifier
from advmoe.moved import getter

CALIBRATION = 1024  # number of training images that int8 is calibrated on
FACTS = "advmoe"  # metadata key in the exported file


@dataclass(frozen=True)
class Format:
    """A file format and its usual suffix. `write` writes a traced network with its metadata, `predictor` opens such a file to run
    it."""

    suffix: str
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]
    predictor: Callable[[Path], Predictor]


FORMATS = {
    "onnx": Format(".onnx", write_onnx, onnx_predictor),
    "torch-export": Format(".pt2", write_program, program_predictor),
}
REFUSED = {
    ("onnx", "bfloat16"): "ONNX Runtime's CPU provider has no bfloat16 convolution; take --dtype int8, or torch-export (.pt2)",
    ("torch-export", "int8"): "torch-export has no int8; take --dtype bfloat16, or onnx (.onnx)",
}


def format_of(path: Path) -> str:
    """The format that the suffix of a file means. Raises UserError if it means none."""
    for name, file_format in FORMATS.items():
        if path.suffix.lower() == file_format.suffix:
            return name
    known = " or ".join(f"{file_format.suffix} ({name})" for name, file_format in FORMATS.items())
    raise UserError(f"{path}: give a name that ends in {known}, or --format")


@dataclass(frozen=True)
class Encoding:
    """How a network is stored: the file's format, "onnx" or "torch-export", and the dtype of its convolutions.

    Raises UserError if the format is unknown, or if it cannot hold convolutions in `dtype`.
    """

    format: str = "onnx"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        lookup(FORMATS, self.format, "format")
        if (self.format, self.dtype) in REFUSED:
            raise UserError(f"{self.format} with {self.dtype}: {REFUSED[self.format, self.dtype]}")


def calibration_images(splits: Splits) -> Tensor:
    """Training images [n, C, H, W] for the calibration of int8: at most `CALIBRATION`, balanced over the classes."""
    return splits.train.subset(balanced(splits.train.labels, CALIBRATION)).pixels()


def export(
    model: Classifier, shape: tuple[int, int, int], path: Path, *,
    encoding: Encoding = Encoding(), facts: Mapping[str, Any] | None = None, calibration: Tensor | None = None,
) -> Predictor:  # fmt: skip
    """Write `model` for images of `shape` (C, H, W) to the file `path`, and return a function that runs the file.

    If writing fails, `path` does not change. The file contains the normalisation and the routers, takes any batch size, and
    computes only the chosen experts. `facts` are stored in it as JSON under the key `advmoe`. Whatever the dtype of the
    convolutions, routers and logits are float32. int8 needs a few hundred real images [n, C, H, W] as `calibration`.

    Raises UserError if a package of the extra `export` is missing, and ValueError if int8 gets no `calibration`.
    """
    if encoding.format == "onnx":
        check_extra()  # fail before the tracing, which takes a minute
    program = traced(model, shape, torch.bfloat16 if encoding.dtype == "bfloat16" else torch.float32)
    metadata = {} if facts is None else {FACTS: json.dumps(facts)}
    if encoding.dtype == "int8":
        if calibration is None:
            raise ValueError("int8 needs images for its calibration")
        write_int8(program, path, metadata, calibration)
    else:
        FORMATS[encoding.format].write(program, path, metadata)
    return FORMATS[encoding.format].predictor(path)


__all__ = [
    "BATCHES", "CALIBRATION", "FACTS", "FORMATS", "Agreement", "Comparison", "Dtype", "Encoding", "Outputs", "Predictor",
    "agreement", "calibration_images", "compare", "export", "format_of", "onnx_predictor", "outputs",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = getter(__name__)
