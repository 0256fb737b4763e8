import hashlib
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from advmoe.config import ModelConfig, RunConfig, RuntimeConfig, load_yaml
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.files import write_atomically
from advmoe.training.checkpoint import Checkpoint, RunFolder, best_epoch, load_weights
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
    """The checkpoint of epoch len(scores); its weights hold that number."""
    model = linear(len(scores))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder.save(linear(len(scores)).state_dict(), {"all": optimizer.state_dict()}, Progress(rows(*scores)), "f" * 64)


def saved(path: Path, *scores: float) -> RunFolder:
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


def complaint(call: Any, *args: Any, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **fields)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# Saving


def test_a_checkpoint_is_loaded_as_it_was(tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 10, 20))
    assert (checkpoint.epoch, checkpoint.fingerprint, checkpoint.history) == (2, "f" * 64, rows(10, 20))
    assert torch.equal(checkpoint.model_state()["weight"], torch.full((2, 3), 2.0))
    assert torch.equal(checkpoint.optimizer_states()["all"]["state"][0]["momentum_buffer"], torch.ones(2, 3))


def test_numbers_of_the_history_come_back_exactly(tmp_path: Path) -> None:
    scores = (0.1 + 0.2, 1 / 3, 1e-300)
    assert latest(saved(tmp_path, *scores)).history == rows(*scores)


def test_tensors_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    folder.save({"w": torch.arange(6.0).reshape(2, 3).T}, {}, Progress(rows(1)), "")
    assert latest(folder).model_state()["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_the_images_are_is_loaded_exactly(tmp_path: Path) -> None:
    spec = ImageSpec(("a", "\u00e9t\u00e9"), (3, 8, 9), (0.1 + 0.2, 1 / 3, 0.5), (1e-2, 0.2, 0.25))
    folder = saved(tmp_path)
    folder.save(linear(1).state_dict(), {}, Progress(rows(1)), "f" * 64, spec)
    assert latest(folder).spec == spec
    assert folder.best().spec == spec


def test_checkpoints_older_than_that_are_read(tmp_path: Path) -> None:
    assert latest(saved(tmp_path, 1)).spec is None


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    assert sorted(everything(folder.path)) == sorted(
        ["config.yaml", "metrics.jsonl", *(f"checkpoints/epoch-0001/{name}" for name in FILES)]
    )


def test_metrics_hold_one_line_an_epoch(tmp_path: Path) -> None:
    lines = (saved(tmp_path, 3, 1, 2).path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows(3, 1, 2)


@pytest.mark.parametrize(
    ("scores", "kept"),
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
def test_last_two_and_best_are_kept(scores: tuple[float, ...], kept: list[int], tmp_path: Path) -> None:
    assert names(saved(tmp_path, *scores)) == [f"epoch-{epoch:04d}" for epoch in kept]


@pytest.mark.parametrize(("scores", "epoch"), [((1,), 1), ((1, 3, 2), 2), ((3, 3, 1), 1), ((-2, -1), 2), ((0, 0, 0), 1)])
def test_best_epoch_is_the_first_of_the_highest(scores: tuple[float, ...], epoch: int) -> None:
    assert best_epoch(rows(*scores)) == epoch


def test_best_gives_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    best = saved(tmp_path, 1, 9, 3, 4).best()
    assert best.epoch == 2
    assert best.model_state()["weight"].unique().item() == 2


def test_best_of_a_run_without_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert folder.latest() is None
    assert complaint(folder.best) == f"{folder.path}: holds no checkpoint yet"


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_best_that_is_lost_is_named(how: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 9, 3, 4)
    place = folder.checkpoint_path / "epoch-0002"
    shutil.rmtree(place) if how == "gone" else (place / "model.safetensors").write_bytes(b"")
    assert complaint(folder.best) == f"{place}: checkpoint missing or damaged"


def test_an_epoch_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    folder.save(linear(7).state_dict(), {}, Progress(rows(1, 5)), "new")
    assert names(folder) == ["epoch-0001", "epoch-0002"]
    assert (latest(folder).fingerprint, latest(folder).model_state()["weight"].unique().item()) == ("new", 7)


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_cut_file_is_skipped(name: str, share: float, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    path = folder.checkpoint_path / "epoch-0003" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert latest(folder).epoch == 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_skipped(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    (folder.checkpoint_path / "epoch-0003" / name).unlink()
    assert latest(folder).epoch == 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    path = folder.checkpoint_path / "epoch-0003" / name
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 400)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert latest(folder).epoch == 2, f"byte {place}: {content[max(0, place - 9) : place + 9]!r}"
    path.write_bytes(content)
    assert latest(folder).epoch == 3


@pytest.mark.parametrize("text", ["null", "[]", "{}", '"x"', "3", '{"sha256": []}', '{"sha256": {}, "schema": 99}'])
def test_a_manifest_of_another_shape_is_skipped(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    (folder.checkpoint_path / "epoch-0003" / "manifest.json").write_text(text)
    assert latest(folder).epoch == 2


def test_no_complete_checkpoint_at_all(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    for path in folder.checkpoint_path.glob("*/manifest.json"):
        path.write_text("")
    assert folder.latest() is None


def test_a_stray_file_is_no_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    (folder.checkpoint_path / "epoch-9999").write_text("stray")
    assert latest(folder).epoch == 2


# Crashes


def test_a_crash_before_the_rename_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, 1, 2)
    before = everything(folder.path)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 1, 2, 3)
    folder.clean()
    assert everything(folder.path) == before
    assert latest(folder).epoch == 2
    save(folder, 1, 2, 3)
    assert latest(folder).epoch == 3


@pytest.mark.parametrize("name", ["save_file", "torch.save", "sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nwriting")])
def test_a_full_disk_leaves_the_checkpoint_before(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 1, 2)
    before = everything(folder.path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"advmoe.training.checkpoint.{name}", full)
    assert "checkpoint could not be written" in complaint(save, folder, 1, 2, 3)
    assert everything(folder.path) == before
    assert names(folder) == ["epoch-0001", "epoch-0002"]


def test_a_crash_before_pruning_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, 1, 9, 3)

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
    saved(tmp_path, 1)
    assert set(FILES) <= set(events[: events.index("rename")])


def test_clean_removes_drafts_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    before = everything(folder.path)
    for epoch in (3, 4):
        draft = folder.checkpoint_path / f".draft-{epoch:04d}"
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(b"half")
    folder.clean()
    assert everything(folder.path) == before
    assert names(folder) == ["epoch-0001", "epoch-0002"]


def test_a_draft_in_the_way_is_no_obstacle(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    (folder.checkpoint_path / ".draft-0002").mkdir()
    (folder.checkpoint_path / ".draft-0002" / "other").write_bytes(b"half")
    save(folder, 1, 2)
    assert sorted(path.name for path in (folder.checkpoint_path / "epoch-0002").iterdir()) == sorted(FILES)


def test_text_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write_atomically(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# Claiming a folder


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
    folder = saved(tmp_path, 1)
    before = everything(folder.path)
    text = complaint(folder.claim, CONFIG, resume=False)
    assert text.startswith(f"{folder.path}: holds this run unfinished; add --resume")
    folder.claim(CONFIG, resume=True)
    assert everything(folder.path) == before


@pytest.mark.parametrize("resume", [True, False])
def test_claim_another_run(resume: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    before = everything(folder.path)
    other = CONFIG.replace(model=ModelConfig(num_experts=4))
    text = complaint(folder.claim, other, resume=resume)
    reason = "holds another run (model.num_experts: 2, not 4); give another --out, or the settings of that run"
    assert text == f"{folder.path}: {reason}"
    assert everything(folder.path) == before


def test_claim_on_another_device(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    folder.claim(CONFIG.replace(runtime=RuntimeConfig(threads=2)), resume=True)
    assert folder.config() == CONFIG


@pytest.mark.parametrize("resume", [True, False])
def test_claim_a_folder_of_other_files(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    text = complaint(RunFolder(tmp_path).claim, CONFIG, resume=resume)
    assert text == f"{tmp_path}: is neither an empty folder nor the folder of a run; give another --out"
    assert everything(tmp_path) == {"thesis.txt": b"years of work"}


def test_claim_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    assert "is neither an empty folder" in complaint(RunFolder(path).claim, CONFIG, resume=False)
    assert path.read_text() == "x"


def test_claim_a_run_whose_configuration_is_damaged(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    folder.config_path.write_text("training: [")
    assert complaint(folder.claim, CONFIG, resume=True).startswith(f"{folder.config_path}: not YAML")


def test_a_folder_without_a_run_has_no_configuration(tmp_path: Path) -> None:
    assert complaint(RunFolder(tmp_path).config) == f"{tmp_path}: holds no run (no config.yaml)"
    assert complaint(RunFolder(tmp_path / "none").config) == f"{tmp_path / 'none'}: holds no run (no config.yaml)"


def test_a_claim_that_was_cut_short_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            RunFolder(tmp_path / "run").claim(CONFIG, resume=False)
    RunFolder(tmp_path / "run").claim(CONFIG, resume=False)
    assert RunFolder(tmp_path / "run").config() == CONFIG


# Loading


def test_weights_are_filled_in(tmp_path: Path) -> None:
    model = linear(0)
    load_weights(model, latest(saved(tmp_path, 1, 2)))
    assert model.weight.unique().item() == 2
    assert model.bias.unique().item() == -2


@pytest.mark.parametrize("other", [nn.Linear(4, 2), nn.Linear(3, 2, bias=False), nn.Sequential(nn.Linear(3, 2)), nn.BatchNorm1d(2)])
def test_weights_of_another_model(other: nn.Module, tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 1))
    assert complaint(load_weights, other, checkpoint).startswith(f"{checkpoint.folder}: holds another model's weights (")


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 1))
    (checkpoint.folder / "model.safetensors").write_bytes(b"not this")
    assert complaint(load_weights, linear(0), checkpoint).startswith(f"{checkpoint.folder}: ")


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_optimizer_states_does_not_run(tmp_path: Path) -> None:
    checkpoint, mark = latest(saved(tmp_path, 1)), tmp_path / "ran"
    torch.save({"all": Touch(mark)}, checkpoint.folder / "optimizers.pt")
    with pytest.raises(UserError, match="not optimizer states"):
        checkpoint.optimizer_states()
    assert not mark.exists()
    torch.load(checkpoint.folder / "optimizers.pt", weights_only=False)
    assert mark.exists()


# Files from strangers, whose checksums are right


def rewritten(folder: RunFolder, **changes: Any) -> RunFolder:
    """The newest checkpoint with other values in its manifest, sealed anew."""
    path = folder.epochs()[-1] / "manifest.json"
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
def test_manifest_of_odd_values_is_none_of_ours(name: str, tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path, 1), **HOSTILE[name])
    assert folder.latest() is None
    assert folder.damaged() == ["epoch-0001"]
    complaint(folder.best)


def test_manifest_as_it_was_is_ours(tmp_path: Path) -> None:
    assert latest(rewritten(saved(tmp_path, 1))).epoch == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "null", "\ufeff{}"])
def test_manifest_that_is_no_json_we_read(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    (folder.epochs()[0] / "manifest.json").write_text(text)
    assert folder.latest() is None


def test_pipe_instead_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    (folder.epochs()[0] / "model.safetensors").unlink()
    os.mkfifo(folder.epochs()[0] / "model.safetensors")
    assert folder.latest() is None


@pytest.mark.parametrize("states", [[], None, 3, {"all": 3}, {"all": [1]}])
def test_states_of_another_form_are_refused(states: Any, tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 1))
    torch.save(states, checkpoint.folder / "optimizers.pt")
    assert complaint(checkpoint.optimizer_states).endswith("optimizers.pt: not optimizer states (TypeError)")


def test_packed_states_are_a_bomb(tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 1))
    path = checkpoint.folder / "optimizers.pt"
    torch.save({"all": {"x": torch.zeros(2**18)}}, path)
    with zipfile.ZipFile(path) as whole:
        contents = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    assert complaint(checkpoint.optimizer_states).endswith("optimizers.pt: not optimizer states (ValueError)")


@pytest.mark.parametrize("size", [2**27, 2**63, 2**64 - 1])
def test_weights_with_a_header_of_any_size_are_refused(size: int, tmp_path: Path) -> None:
    checkpoint = latest(saved(tmp_path, 1))
    (checkpoint.folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    assert "holds no weights (SafetensorError" in complaint(checkpoint.model_state)
