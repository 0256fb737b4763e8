"""Damaged checkpoints are skipped; hostile ones are refused in one line and run no code."""

import hashlib
import json
import os
import shlex
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import refusal
from run_folders import FILES, latest, saved_run

from advmoe.errors import UserError
from advmoe.training.checkpoint import RunFolder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_cut_file_is_skipped(name: str, share: float, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2, 3)
    path = folder.checkpoint_path / "epoch-0003" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert latest(folder).epoch == 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_skipped(name: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2, 3)
    (folder.checkpoint_path / "epoch-0003" / name).unlink()
    assert latest(folder).epoch == 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_detected(name: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2, 3)
    path = folder.checkpoint_path / "epoch-0003" / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 400)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert latest(folder).epoch == 2, f"byte {position}: {content[max(0, position - 9) : position + 9]!r}"
    path.write_bytes(content)
    assert latest(folder).epoch == 3


@pytest.mark.parametrize("text", ["null", "[]", "{}", '"x"', "3", '{"sha256": []}', '{"sha256": {}, "schema": 99}'])
def test_a_manifest_of_another_shape_is_skipped(text: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2, 3)
    (folder.checkpoint_path / "epoch-0003" / "manifest.json").write_text(text)
    assert latest(folder).epoch == 2


def test_no_complete_checkpoint_at_all(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2)
    for path in folder.checkpoint_path.glob("*/manifest.json"):
        path.write_text("")
    assert folder.latest() is None


def test_a_stray_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1, 2)
    (folder.checkpoint_path / "epoch-9999").write_text("stray")
    assert latest(folder).epoch == 2


# Untrusted files with correct checksums


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def test_code_in_optimizer_states_does_not_run(tmp_path: Path) -> None:
    checkpoint, mark = latest(saved_run(tmp_path, 1)), tmp_path / "ran"
    torch.save({"all": Touch(mark)}, checkpoint.folder / "optimizers.pt")
    with pytest.raises(UserError, match="not optimizer states"):
        checkpoint.optimizer_states()
    assert not mark.exists()
    torch.load(checkpoint.folder / "optimizers.pt", weights_only=False)
    assert mark.exists()


def with_manifest(folder: RunFolder, **changes: Any) -> RunFolder:
    """The run with other values in its newest manifest, and a correct seal."""
    path = folder.checkpoint_folders()[-1] / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest = {name: value for name, value in manifest.items() if name != "seal" and value is not ...}
    path.write_text(json.dumps({**manifest, "seal": hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}))
    return folder


SOUND = {"classes": ["a"], "shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}
HOSTILE: dict[str, dict[str, Any]] = {
    "a file elsewhere": {"sha256": {"/dev/zero": "0"}},
    "a file above": {"sha256": {"../../config.yaml": "0"}},
    "no checksums": {"sha256": {}},
    "no history": {"history": []},
    "history of words": {"history": ["x"]},
    "row without a score": {"history": [{"phase": 1}]},
    "score of words": {"history": [{"phase": 1, "score": "x"}]},
    "score of 400 digits": {"history": [{"phase": 1, "score": 10**400}]},
    "seconds of words": {"history": [{"phase": 1, "score": 1.0, "train_seconds": "x"}]},
    "epoch of words": {"epoch": "x"},
    "fingerprint of numbers": {"fingerprint": 3},
    "infinite shape": {"spec": SOUND | {"shape": [float("inf"), 8, 8]}},
    "shape below 0": {"spec": SOUND | {"shape": [1, -8, 8]}},
    "shape of 2**40": {"spec": SOUND | {"shape": [1, 2**40, 8]}},
    "no deviation": {"spec": SOUND | {"std": [0.0]}},
    "mean of 400 digits": {"spec": SOUND | {"mean": [10**400]}},
    "no classes": {"spec": SOUND | {"classes": []}},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_a_manifest_with_invalid_values_counts_as_damaged(name: str, tmp_path: Path) -> None:
    folder = with_manifest(saved_run(tmp_path, 1), **HOSTILE[name])
    assert folder.latest() is None
    assert folder.damaged() == ["epoch-0001"]
    refusal(folder.best)


def test_a_manifest_with_its_values_and_a_new_seal_is_read(tmp_path: Path) -> None:
    assert latest(with_manifest(saved_run(tmp_path, 1))).epoch == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "null", "\ufeff{}"])
def test_a_manifest_that_is_not_json_is_skipped(text: str, tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    (folder.checkpoint_folders()[0] / "manifest.json").write_text(text)
    assert folder.latest() is None


def test_a_pipe_instead_of_weights_is_skipped(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, 1)
    (folder.checkpoint_folders()[0] / "model.safetensors").unlink()
    os.mkfifo(folder.checkpoint_folders()[0] / "model.safetensors")
    assert folder.latest() is None


@pytest.mark.parametrize("states", [[], None, 3, {"all": 3}, {"all": [1]}])
def test_states_of_another_form_are_refused(states: Any, tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 1))
    torch.save(states, checkpoint.folder / "optimizers.pt")
    assert refusal(checkpoint.optimizer_states).endswith("optimizers.pt: not optimizer states (TypeError)")


def test_compressed_optimizer_states_are_refused(tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 1))
    path = checkpoint.folder / "optimizers.pt"
    torch.save({"all": {"x": torch.zeros(2**18)}}, path)
    with zipfile.ZipFile(path) as stored:
        contents = {info.filename: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    assert refusal(checkpoint.optimizer_states).endswith("optimizers.pt: not optimizer states (ValueError)")


@pytest.mark.parametrize("size", [2**27, 2**63, 2**64 - 1])
def test_weights_with_a_header_of_any_size_are_refused(size: int, tmp_path: Path) -> None:
    checkpoint = latest(saved_run(tmp_path, 1))
    (checkpoint.folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    assert "holds no weights (SafetensorError" in refusal(checkpoint.model_state)
