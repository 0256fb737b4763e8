"""Write a traced network in the file format of torch.export (.pt2), and run such files."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from advmoe.errors import UserError
from advmoe.export.compare import Predictor
from advmoe.files import drafted


def write_program(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    """Write a traced network for torch.export.load, with `facts` as the extra files."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(facts))
    with drafted(path) as draft:
        draft.write_bytes(buffer.getbuffer())


def program_predictor(path: Path) -> Predictor:
    """A function that runs such a file with PyTorch. Raises UserError if the file is damaged, OSError if it cannot be opened.

    It maps pixels [B, C, H, W] to logits [B, classes] and, if routed, routes [B, L].
    """
    try:
        with path.open("rb") as file:
            predictor: Predictor = torch.export.load(io.BytesIO(file.read())).module()
    except OSError:
        raise
    except Exception as error:  # torch raises many exception classes
        raise UserError(f"{path}: not a file of torch.export ({type(error).__name__})") from None
    return predictor
