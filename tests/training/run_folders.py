"""Folders of runs with small checkpoints, for tests."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from advmoe.config import RunConfig
from advmoe.training.checkpoint import Checkpoint, RunFolder
from advmoe.training.manifest import Progress

CONFIG = RunConfig(seed=3)
FILES = ["model.safetensors", "optimizers.pt", "manifest.json"]


def rows(*scores: float) -> list[dict[str, Any]]:
    """A history of one phase with these scores."""
    return [{"epoch": number, "phase": 1, "score": score, "load": [[0.25, 0.75]]} for number, score in enumerate(scores, start=1)]


def linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(-value)
    return model


def save(folder: RunFolder, *scores: float) -> None:
    """Save the checkpoint of epoch len(scores). Its weights are that number."""
    model = linear(len(scores))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder.save(linear(len(scores)).state_dict(), {"all": optimizer.state_dict()}, Progress(rows(*scores)), "f" * 64)


def saved_run(path: Path, *scores: float) -> RunFolder:
    """A run with a checkpoint after each epoch."""
    folder = RunFolder(path / "run")
    folder.claim(CONFIG, resume=False)
    for epoch in range(1, len(scores) + 1):
        save(folder, *scores[:epoch])
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoint_path.iterdir())


def latest(folder: RunFolder) -> Checkpoint:
    checkpoint = folder.latest()
    assert checkpoint is not None
    return checkpoint


def all_files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
