"""Checkpoints: saving and loading, which ones are kept, and weights of another network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusal import refusal
from run_folders import FILES, all_files, latest, linear, names, rows, save, saved_run
from torch import nn

from advmoe.data import ImageSpec
from advmoe.training.checkpoint import best_epoch, load_weights
from advmoe.training.manifest import Partial, Progress


def test_a_checkpoint_is_loaded_as_it_was(tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 10, 20))
    assert (checkpoint.epoch, checkpoint.fingerprint, checkpoint.history) == (2, "f" * 64, rows(10, 20))
    assert torch.equal(checkpoint.model_state()["weight"], torch.full((2, 3), 2.0))
    assert torch.equal(checkpoint.optimizer_states()["all"]["state"][0]["momentum_buffer"], torch.ones(2, 3))


def test_numbers_of_the_history_are_loaded_exactly(tmp_path: Path) -> None:
    scores = (0.1 + 0.2, 1 / 3, 1e-300)
    assert latest(saved_run(tmp_path, *scores)).history == rows(*scores)


def test_tensors_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    folder.save({"w": torch.arange(6.0).reshape(2, 3).T}, {}, Progress(rows(1)), "")
    assert latest(folder).model_state()["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_image_spec_is_loaded_exactly(tmp_path: Path) -> None:
    spec = ImageSpec(("a", "\u00e9t\u00e9"), (3, 8, 9), (0.1 + 0.2, 1 / 3, 0.5), (1e-2, 0.2, 0.25))
    folder = saved_run(tmp_path)
    folder.save(linear(1).state_dict(), {}, Progress(rows(1)), "f" * 64, spec)
    assert latest(folder).spec == spec
    assert folder.best().spec == spec


def test_checkpoints_without_an_image_spec_are_read(tmp_path: Path) -> None:
    assert latest(saved_run(tmp_path, 1)).spec is None


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    assert sorted(all_files(folder.path)) == sorted(
        ["config.yaml", "metrics.jsonl", *(f"checkpoints/epoch-0001/{name}" for name in FILES)]
    )


def test_metrics_hold_one_line_an_epoch(tmp_path: Path) -> None:
    lines = (saved_run(tmp_path, 3, 1, 2).path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows(3, 1, 2)


@pytest.mark.parametrize(
    ("scores", "epochs"),
    [
        ((1,), [1]),
        ((1, 2), [1, 2]),
        ((1, 2, 3, 4), [3, 4]),
        ((1, 9, 3, 4, 5), [2, 4, 5]),
        ((1, 9, 3, 9, 5, 5), [2, 5, 6]),
        ((5, 4, 3, 2, 1), [1, 4, 5]),
        ((5, 4, 3, 6, 1), [4, 5]),
    ],
)
def test_the_last_two_and_the_best_are_kept(scores: tuple[float, ...], epochs: list[int], tmp_path: Path) -> None:
    assert names(saved_run(tmp_path, *scores)) == [f"epoch-{epoch:04d}" for epoch in epochs]


def test_the_last_two_within_an_epoch_are_kept_until_it_is_complete(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    for iteration in (1, 2, 3):
        within = Partial(iteration=iteration, images=[8], seconds=1.0, sums={"loss": [0.5]})
        folder.save(linear(1).state_dict(), {}, Progress(rows(1), within), "")
    assert names(folder) == ["epoch-0001", "epoch-0001-000002", "epoch-0001-000003"]
    save(folder, 1, 2)
    assert names(folder) == ["epoch-0001", "epoch-0002"]


@pytest.mark.parametrize(("scores", "epoch"), [((1,), 1), ((1, 3, 2), 2), ((3, 3, 1), 1), ((-2, -1), 2), ((0, 0, 0), 1)])
def test_best_epoch_is_the_first_of_the_highest(scores: tuple[float, ...], epoch: int) -> None:
    assert best_epoch(rows(*scores)) == epoch


def test_best_has_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    best = saved_run(tmp_path, 1, 9, 3, 4).best()
    assert best.epoch == 2
    assert best.model_state()["weight"].unique().item() == 2


def test_best_of_a_run_without_checkpoints(tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    assert folder.latest() is None
    assert refusal(folder.best) == f"{folder.path}: holds no checkpoint yet"


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_lost_best_checkpoint_is_named(how: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 9, 3, 4)
    path = folder.checkpoint_path / "epoch-0002"
    shutil.rmtree(path) if how == "gone" else (path / "model.safetensors").write_bytes(b"")
    assert refusal(folder.best) == f"{path}: checkpoint missing or damaged"


def test_an_epoch_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2)
    folder.save(linear(7).state_dict(), {}, Progress(rows(1, 5)), "new")
    assert names(folder) == ["epoch-0001", "epoch-0002"]
    assert (latest(folder).fingerprint, latest(folder).model_state()["weight"].unique().item()) == ("new", 7)


# Loading


def test_load_weights(tmp_path: Path) -> None:
    model = linear(0)
    load_weights(model, latest(saved_run(tmp_path, 1, 2)))
    assert model.weight.unique().item() == 2
    assert model.bias.unique().item() == -2


@pytest.mark.parametrize("other", [nn.Linear(4, 2), nn.Linear(3, 2, bias=False), nn.Sequential(nn.Linear(3, 2)), nn.BatchNorm1d(2)])
def test_weights_of_another_model(other: nn.Module, tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 1))
    assert refusal(load_weights, other, checkpoint).startswith(f"{checkpoint.folder}: holds another model's weights (")


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 1))
    (checkpoint.folder / "model.safetensors").write_bytes(b"not this")
    assert refusal(load_weights, linear(0), checkpoint).startswith(f"{checkpoint.folder}: ")
