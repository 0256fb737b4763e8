"""After a crash or on a full disk, the previous checkpoint is still there."""

from pathlib import Path
from typing import Any

import pytest
from refusal import refusal
from run_folders import FILES, all_files, latest, names, save, saved_run


def test_a_crash_before_the_rename_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_run(tmp_path, 1, 2)
    before = all_files(folder.path)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 1, 2, 3)
    folder.clean()
    assert all_files(folder.path) == before
    assert latest(folder).epoch == 2
    save(folder, 1, 2, 3)
    assert latest(folder).epoch == 3


@pytest.mark.parametrize("name", ["save", "torch.save", "sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nwriting")])
def test_a_full_disk_keeps_the_previous_checkpoint(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_run(tmp_path, 1, 2)
    before = all_files(folder.path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"advmoe.training.checkpoint.{name}", full)
    assert "checkpoint could not be written" in refusal(save, folder, 1, 2, 3)
    assert all_files(folder.path) == before
    assert names(folder) == ["epoch-0001", "epoch-0002"]


def test_a_crash_before_pruning_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_run(tmp_path, 1, 9, 3)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("advmoe.training.checkpoint.write_atomically", crash)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 1, 9, 3, 4)
    assert (latest(folder).epoch, folder.best().epoch) == (4, 2)


def test_files_reach_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr("advmoe.training.checkpoint.sync", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to))[1])
    saved_run(tmp_path, 1)
    assert set(FILES) <= set(events[: events.index("rename")])


def test_clean_removes_only_drafts_of_a_training(tmp_path: Path) -> None:
    """An evaluation may be writing a Record into the folder, and an export a file."""
    folder = saved_run(tmp_path, 1, 2)
    for name in (".record.json.12345678.draft", ".model.onnx.12345678.draft"):
        (folder.path / name).write_bytes(b"half")
    before = all_files(folder.path)
    for name in (".config.yaml.12345678.draft", ".metrics.jsonl.12345678.draft"):
        (folder.path / name).write_bytes(b"half")
    for epoch in (3, 4):
        draft = folder.checkpoint_path / f".draft-{epoch:04d}"
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(b"half")
    folder.clean()
    assert all_files(folder.path) == before
    assert names(folder) == ["epoch-0001", "epoch-0002"]


def test_an_old_draft_is_replaced(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    (folder.checkpoint_path / ".draft-0002").mkdir()
    (folder.checkpoint_path / ".draft-0002" / "other").write_bytes(b"half")
    save(folder, 1, 2)
    assert sorted(path.name for path in (folder.checkpoint_path / "epoch-0002").iterdir()) == sorted(FILES)
