"""A trained network as one file for other programs: ONNX, or torch.export's own format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from advmoe.errors import lookup
from advmoe.export.compare import BATCHES, Answers, Comparison, Predictor, answers, compare
from advmoe.export.onnx import check_extra, onnx_predictor, write_onnx
from advmoe.export.program import program_predictor, write_program
from advmoe.export.traceable import traced
from advmoe.models import Classifier

FACTS = "advmoe"  # key of what a file says of itself


@dataclass(frozen=True)
class Format:
    """How a traced network is written, with facts of its own, and how the file is run."""

    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]
    predictor: Callable[[Path], Predictor]


FORMATS = {"onnx": Format(write_onnx, onnx_predictor), "torch-export": Format(write_program, program_predictor)}


def export(
    model: Classifier, shape: tuple[int, int, int], path: Path, form: str = "onnx", facts: Mapping[str, Any] | None = None
) -> Predictor:
    """Write `model` for pictures of `shape` (C, H, W) to the file `path`, whole or not at all; give what runs that file.

    Normalisation and routers are part of it, batch norms are folded in, the batch is of any size, and of each MoE layer only the
    chosen experts are computed. `facts` (JSON) are kept in the file under the key `advmoe`. Raises UserError on an unknown format,
    and where a package of the extra `export` is missing.
    """
    chosen = lookup(FORMATS, form, "format")
    if form == "onnx":
        check_extra()  # before a minute of tracing
    chosen.write(traced(model, shape), path, {} if facts is None else {FACTS: json.dumps(facts)})
    return chosen.predictor(path)


__all__ = ["BATCHES", "FACTS", "FORMATS", "Answers", "Comparison", "Predictor", "answers", "compare", "export", "onnx_predictor"]
