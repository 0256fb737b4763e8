"""A trained network as one file for other programs: ONNX, or torch.export's own format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from advmoe.errors import UserError, lookup
from advmoe.export.compare import BATCHES, Agreement, Answers, Comparison, Predictor, agreement, answers, compare
from advmoe.export.int8 import write_int8
from advmoe.export.onnx import check_extra, onnx_predictor, write_onnx
from advmoe.export.program import program_predictor, write_program
from advmoe.export.traceable import traced
from advmoe.models import Classifier

CALIBRATION = 1024  # training images that int8 takes its ranges from
FACTS = "advmoe"  # key of what a file says of itself


@dataclass(frozen=True)
class Format:
    """How a traced network is written, with facts of its own, and how the file is run."""

    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]
    predictor: Callable[[Path], Predictor]


FORMATS = {"onnx": Format(write_onnx, onnx_predictor), "torch-export": Format(write_program, program_predictor)}
Dtype = Literal["float32", "bfloat16", "int8"]
REFUSED = {
    ("onnx", "bfloat16"): "ONNX Runtime's CPU provider has no bfloat16 convolution; take --dtype int8, or --format torch-export",
    ("torch-export", "int8"): "torch-export has no int8; take --dtype bfloat16, or --format onnx",
}


def check_dtype(form: str, dtype: Dtype) -> None:
    """Raises UserError where files of format `form` have no convolutions in `dtype`, and on an unknown format."""
    lookup(FORMATS, form, "format")
    if (form, dtype) in REFUSED:
        raise UserError(f"{form} with {dtype}: {REFUSED[form, dtype]}")


def export(
    model: Classifier, shape: tuple[int, int, int], path: Path, form: str = "onnx", facts: Mapping[str, Any] | None = None,
    dtype: Dtype = "float32", calibration: Tensor | None = None,
) -> Predictor:  # fmt: skip
    """Write `model` for images of `shape` (C, H, W) to the file `path`, whole or not at all; give what runs that file.

    Normalisation and routers are part of it, batch norms are folded in, the batch is of any size, and of each MoE layer only the
    chosen experts are computed. `facts` (JSON) are kept in the file under the key `advmoe`. `dtype` is the convolutions'; routers
    and logits are float32 in any. int8 needs real images [n, C, H, W], some hundred, as `calibration`. Raises UserError on an
    unknown format, one that has no such `dtype`, and where a package of the extra `export` is missing.
    """
    check_dtype(form, dtype)
    if form == "onnx":
        check_extra()  # before a minute of tracing
    program = traced(model, shape, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    noted = {} if facts is None else {FACTS: json.dumps(facts)}
    if dtype == "int8":
        if calibration is None:
            raise ValueError("int8 needs images for its calibration")
        write_int8(program, path, noted, calibration)
    else:
        FORMATS[form].write(program, path, noted)
    return FORMATS[form].predictor(path)


__all__ = [
    "BATCHES", "CALIBRATION", "FACTS", "FORMATS", "Agreement", "Answers", "Comparison", "Dtype", "Predictor", "agreement",
    "answers", "check_dtype", "compare", "export", "onnx_predictor",
]  # fmt: skip
