"""A traced network in torch.export's own file format (.pt2)."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from advmoe.errors import UserError
from advmoe.export.compare import Predictor
from advmoe.files import drafted


def write_program(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    """Write a traced network for torch.export.load; `facts` are its extra files."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(facts))
    with drafted(path) as draft:
        draft.write_bytes(buffer.getbuffer())


def program_predictor(path: Path) -> Predictor:
    """Such a file, run by PyTorch. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            predictor: Predictor = torch.export.load(io.BytesIO(file.read())).module()
    except OSError:
        raise
    except Exception as error:  # of many classes
        raise UserError(f"{path}: not a file of torch.export ({type(error).__name__})") from None
    return predictor
