"""Claiming a folder for a run, and reading its configuration."""

import os
from pathlib import Path
from typing import Any

import pytest
from refusal import refusal
from run_folders import CONFIG, all_files, saved_run

from advmoe.config import DataConfig, ModelConfig, RuntimeConfig, load_yaml
from advmoe.training.checkpoint import RunFolder


@pytest.mark.parametrize("exists", [True, False])
def test_claim_a_fresh_folder(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    if exists:
        path.mkdir(parents=True)
    RunFolder(path).claim(CONFIG, resume=False)
    assert RunFolder(path).config() == load_yaml(path / "config.yaml") == CONFIG


def test_claim_with_resume_of_a_fresh_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").claim(CONFIG, resume=True)
    assert RunFolder(tmp_path / "run").config() == CONFIG


def test_claim_an_unfinished_run(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    before = all_files(folder.path)
    text = refusal(folder.claim, CONFIG, resume=False)
    assert text.startswith(f"{folder.path}: holds this run unfinished; add --resume")
    folder.claim(CONFIG, resume=True)
    assert all_files(folder.path) == before


@pytest.mark.parametrize("resume", [True, False])
def test_claim_another_run(resume: bool, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    before = all_files(folder.path)
    other = CONFIG.replace(model=ModelConfig(num_experts=4))
    text = refusal(folder.claim, other, resume=resume)
    reason = "holds another run (model.num_experts: 2, not 4); give another --out, or the settings of that run"
    assert text == f"{folder.path}: {reason}"
    assert all_files(folder.path) == before


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("changes", [{"seed": 4}, {"data": DataConfig(data_dir="data"), "runtime": RuntimeConfig(threads=2)}])
def test_claim_the_folder_of_a_run_that_saved_nothing(changes: Any, resume: bool, tmp_path: Path) -> None:
    """Its config.yaml has all settings of the last start: later commands read the place of the data from it."""
    folder = saved_run(tmp_path)
    folder.claim(CONFIG.replace(**changes), resume=resume)
    assert folder.config() == CONFIG.replace(**changes)


@pytest.mark.parametrize("name", ["metrics.jsonl", "record.json", "checkpoints/epoch-0001/manifest.json"])
def test_claim_another_run_without_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / name).write_text("{}")
    assert "holds another run" in refusal(folder.claim, CONFIG.replace(seed=4), resume=True)


def test_claim_on_another_device(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    folder.claim(CONFIG.replace(runtime=RuntimeConfig(threads=2)), resume=True)
    assert folder.config() == CONFIG


@pytest.mark.parametrize("resume", [True, False])
def test_claim_a_folder_of_other_files(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    text = refusal(RunFolder(tmp_path).claim, CONFIG, resume=resume)
    assert text == f"{tmp_path}: is neither an empty folder nor the folder of a run; give another --out"
    assert all_files(tmp_path) == {"thesis.txt": b"years of work"}


def test_claim_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    assert "is neither an empty folder" in refusal(RunFolder(path).claim, CONFIG, resume=False)
    assert path.read_text() == "x"


def test_claim_a_run_whose_configuration_is_damaged(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    folder.config_path.write_text("training: [")
    assert refusal(folder.claim, CONFIG, resume=True).startswith(f"{folder.config_path}: not YAML")


def test_a_folder_without_a_run_has_no_configuration(tmp_path: Path) -> None:
    assert refusal(RunFolder(tmp_path).config) == f"{tmp_path}: holds no run (no config.yaml)"
    assert refusal(RunFolder(tmp_path / "none").config) == f"{tmp_path / 'none'}: holds no run (no config.yaml)"


def test_a_claim_that_was_cut_short_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            RunFolder(tmp_path / "run").claim(CONFIG, resume=False)
    RunFolder(tmp_path / "run").claim(CONFIG, resume=False)
    assert RunFolder(tmp_path / "run").config() == CONFIG
