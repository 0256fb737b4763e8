"""Each fault for one method, in this process; tests/faults has all of them in separate processes."""

import json
import math
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder

from advmoe.config import RunConfig
from advmoe.data import Splits
from advmoe.errors import UserError
from advmoe.runs.failure import FailureRecorder
from advmoe.runs.status import read_run
from advmoe.training import checkpoint, loop, losses
from advmoe.training import manifest as manifest_file
from advmoe.training import run as training_run
from advmoe.training.checkpoint import LOCK, RunFolder
from advmoe.training.interrupts import Stopped
from advmoe.training.loop import train


@pytest.fixture(scope="module")
def config(tiny: Callable[..., RunConfig]) -> RunConfig:
    return tiny("advmoe", epochs=2, tied_share=0.0)


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config, splits, path, Recorder())
    return path


@pytest.fixture
def run(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run, as it was after its first epoch."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/epoch-0002")
    return tmp_path / "run"


def history_without_seconds(run: Path) -> list[dict[str, Any]]:
    latest = RunFolder(run).latest()
    assert latest is not None
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in latest.history]


def assert_same(run: Path, uninterrupted: Path) -> None:
    paths, expected = ({path.name: path for path in RunFolder(folder).checkpoint_folders()} for folder in (run, uninterrupted))
    assert history_without_seconds(run) == history_without_seconds(uninterrupted)
    assert paths.keys() == expected.keys()
    assert all(
        (paths[name] / "model.safetensors").read_bytes() == (expected[name] / "model.safetensors").read_bytes() for name in paths
    )
    assert [path for path in run.rglob("*") if "draft" in path.name] == []


class Signals(Recorder):
    """Sends this process a signal `times` times in the second iteration of the second epoch."""

    def __init__(self, number: signal.Signals, times: int = 1) -> None:
        super().__init__()
        self.number, self.times = number, times

    def iteration(self, epoch: int, done: int, total: int, sums: Any, images: int) -> None:
        for _ in range(self.times if (epoch, done) == (2, 2) else 0):
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_the_step(
    number: signal.Signals, config: RunConfig, splits: Splits, uninterrupted: Path, run: Path
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"after epoch 2, iteration 2 of 3, which is saved") as caught:
        train(config, splits, run, Signals(number), resume=True)
    assert caught.value.number == number
    assert signal.getsignal(number) is before
    latest = RunFolder(run).latest()
    assert latest is not None
    assert latest.partial is not None
    assert (latest.epoch, latest.partial.iteration, latest.folder.name) == (1, 2, "epoch-0001-000002")
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_signal_that_also_closes_the_output(config: RunConfig, splits: Splits, uninterrupted: Path, run: Path) -> None:
    class Broken(Signals):
        def iteration(self, epoch: int, done: int, total: int, sums: Any, images: int) -> None:
            super().iteration(epoch, done, total, sums, images)
            if (epoch, done) == (2, 2):
                raise BrokenPipeError

    with pytest.raises(Stopped, match="iteration 2 of 3, which is saved"):
        train(config, splits, run, Broken(signal.SIGINT), resume=True)
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_signal_after_the_last_step_does_not_stop_the_run(
    config: RunConfig, splits: Splits, uninterrupted: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.validate

    def validate(state: Any, held_out: Any) -> dict[str, Any]:
        if state.done > 0.5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, held_out)

    monkeypatch.setattr(loop, "validate", validate)
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_run_killed_during_validation(
    config: RunConfig, splits: Splits, uninterrupted: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint is that of before the validation."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "BEFORE_VALIDATION", 0.0)
        patch.setattr(loop, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, splits, run, Recorder(), resume=True)
    assert [path.name for path in RunFolder(run).checkpoint_folders()] == ["epoch-0001", "epoch-0001-000003"]
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_second_signal_ends_it_at_once(config: RunConfig, splits: Splits, uninterrupted: Path, run: Path) -> None:
    with pytest.raises(Stopped):
        train(config, splits, run, Signals(signal.SIGINT, times=2), resume=True)
    assert [path.name for path in RunFolder(run).checkpoint_folders()] == ["epoch-0001"]
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_second_sigterm_changes_nothing(config: RunConfig, splits: Splits, uninterrupted: Path, run: Path) -> None:
    with pytest.raises(Stopped, match="which is saved"):
        train(config, splits, run, Signals(signal.SIGTERM, times=2), resume=True)
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


@pytest.fixture(scope="module")
def often(tiny: Callable[..., RunConfig]) -> RunConfig:
    """A run that saves after every iteration."""
    return tiny("advmoe", epochs=2, tied_share=0.0, save_minutes=0.0)


@pytest.fixture(scope="module")
def killed(often: RunConfig, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(often, splits, path, Recorder(lambda epoch, done: (epoch, done) == (2, 3)))
    return path


@pytest.mark.parametrize("damage", ["none", "model.safetensors", "optimizers.pt", "manifest.json"])
def test_a_run_killed_within_an_epoch(
    damage: str, often: RunConfig, splits: Splits, killed: Path, uninterrupted: Path, tmp_path: Path, recorder: Recorder
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "epoch-0001-000002"
    assert last.is_dir()
    if damage != "none":
        (last / damage).write_bytes((last / damage).read_bytes()[:-1])
    train(often, splits, tmp_path / "run", recorder, resume=True)
    assert len([note for note in recorder.notes if last.name in note and "cut short or altered" in note]) == (damage != "none")
    assert_same(tmp_path / "run", uninterrupted)


def forge_manifest(run: Path, **changes: Any) -> None:
    """Change the newest manifest, with a correct checksum."""
    latest = RunFolder(run).latest()
    assert latest is not None
    forge_manifest_in(latest.folder, **changes)


def forge_manifest_in(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's manifest, with a correct checksum."""
    path = folder / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"} | changes
    path.write_text(json.dumps({**manifest, "seal": manifest_file.seal(manifest)}))


def within(iteration: int, sums: Any, images: Any = (1,)) -> dict[str, Any]:
    return {"iteration": iteration, "images": list(images), "seconds": 1.0, "sums": sums}


@pytest.mark.parametrize(
    "changes",
    [
        {"partial": within(-2, {"loss": [1.0]})}, {"partial": within(2, {"loss": "x"})}, {"epoch": 7}, {"restores": -1},
        {"partial": within(2, {"loss": [1.0, 2.0]})}, {"partial": within(2, {}, images=())},
    ],
)  # fmt: skip
def test_a_forged_manifest_counts_as_damage(
    changes: dict[str, Any], config: RunConfig, splits: Splits, uninterrupted: Path, tmp_path: Path, recorder: Recorder
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    forge_manifest(tmp_path / "run", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda *position: position == (2, 1)), resume=True)
    assert "epoch-0002 is cut short or altered; epoch-0001 is used" in recorder.notes[0]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"foo": {}}, "holds the states of foo, not of routers, weights"),
        ({"routers": {}, "weights": {}}, "holds another run's states of level routers"),
    ],
)
def test_forged_optimizer_states_are_refused(states: Any, message: str, config: RunConfig, splits: Splits, run: Path) -> None:
    latest = RunFolder(run).latest()
    assert latest is not None
    torch.save(states, latest.folder / "optimizers.pt")
    sums = {name: checkpoint._sha256(latest.folder / name) for name in manifest_file.FILES}
    forge_manifest_in(latest.folder, sha256=sums)
    with pytest.raises(UserError, match=message):
        train(config, splits, run, Recorder(), resume=True)


def test_momentum_of_other_shapes_is_refused(config: RunConfig, splits: Splits, run: Path) -> None:
    latest = RunFolder(run).latest()
    assert latest is not None
    states = latest.optimizer_states()
    states["weights"]["state"][0]["momentum_buffer"] = torch.zeros(1)
    torch.save(states, latest.folder / "optimizers.pt")
    forge_manifest_in(latest.folder, sha256={name: checkpoint._sha256(latest.folder / name) for name in manifest_file.FILES})
    with pytest.raises(UserError, match="of other shapes"):
        train(config, splits, run, Recorder(), resume=True)


def test_more_iterations_than_the_epoch_has_are_refused(config: RunConfig, splits: Splits, run: Path) -> None:
    forge_manifest(run, partial=within(10, {"loss": [1.0]}))
    with pytest.raises(UserError, match="is 10 iterations into an epoch of 3"):
        train(config, splits, run, Recorder(), resume=True)


def test_restore_may_be_requested_after_the_stop(config: RunConfig, splits: Splits, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    restoring = config.replace(training=config.training.replace(on_nonfinite="restore"))
    assert len(train(restoring, splits, tmp_path / "run", Recorder(), resume=True)) == 2


def test_a_nan_in_the_second_phase_returns_to_the_first(
    tiny: Callable[..., RunConfig], splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the checkpoint at the end of the first phase is damaged."""
    restoring = tiny("at_sparse", epochs=2, on_nonfinite="restore")

    class Damaging(Recorder):
        def epoch(self, row: Any) -> None:
            super().epoch(row)
            if row["epoch"] == 2 and len(self.rows) == 2:
                path = tmp_path / "run/checkpoints/epoch-0002/optimizers.pt"
                path.write_bytes(path.read_bytes()[:-1])

    make_losses_nan(monkeypatch, {2 * 3 + 1})
    damaging = Damaging()
    history = train(restoring, splits, tmp_path / "run", damaging)
    assert [row["epoch"] for row in damaging.rows] == [1, 2, 2, 3, 4]
    assert [row["phase"] for row in history] == [1, 1, 2, 2]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


def test_a_folder_of_a_process_killed_during_its_claim_can_be_used(
    config: RunConfig, splits: Splits, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).write_text("")
    (run / ".config.yaml.4194305.draft").write_text("schema: 1\nmeth")
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_another_process_that_uses_the_folder_is_named(
    config: RunConfig, splits: Splits, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    with RunFolder(tmp_path / "run").locked():
        for _ in range(2):
            with pytest.raises(UserError) as caught:
                train(config, splits, tmp_path / "run", Recorder(), resume=True)
            assert str(os.getpid()) in str(caught.value)
            assert socket.gethostname() in str(caught.value)
    train(config, splits, tmp_path / "run", Recorder(), resume=True)
    assert_same(tmp_path / "run", uninterrupted)


def make_losses_nan(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Make the losses with these numbers NaN, counted from 1."""
    loss, number = losses.LOSSES["trades"], [0]

    def value(*args: Any) -> losses.Outcome:
        number[0] += 1
        outcome = loss.value(*args)
        return outcome._replace(total=outcome.total * torch.nan) if number[0] in numbers else outcome

    monkeypatch.setitem(losses.LOSSES, "trades", losses.Loss(loss.attack, value))


SECOND = 3  # the routers' loss of the second iteration


def test_a_nan_stops_the_run(
    config: RunConfig, splits: Splits, uninterrupted: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        make_losses_nan(patch, {SECOND})
        with pytest.raises(UserError) as caught:
            train(config, splits, run, Recorder(), resume=True)
    folder = run / "checkpoints"
    assert str(caught.value) == (
        f"epoch 2: iteration 2 of 3: loss (routers update) is not finite; last good checkpoint: epoch-0001 in {folder}"
    )
    train(config, splits, run, Recorder(), resume=True)
    assert_same(run, uninterrupted)


def test_a_run_that_fails_in_its_first_iteration_is_marked_and_can_be_started_with_other_settings(
    config: RunConfig, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        make_losses_nan(patch, {1})
        with pytest.raises(UserError, match="last good checkpoint: none yet"), FailureRecorder(folder) as recorder:
            train(config, splits, folder, recorder)
    assert read_run(folder).describe().startswith("failed: epoch 1: iteration 1 of 3")
    smaller = config.replace(training=config.training.replace(batch_size=15, epochs=1))
    with FailureRecorder(folder) as recorder:
        train(smaller, splits, folder, recorder)
    assert RunFolder(folder).config() == smaller
    assert read_run(folder).describe() == "trained"


def test_after_a_nan_a_restored_run_has_half_the_routers_learning_rate(
    tiny: Callable[..., RunConfig],
    splits: Splits,
    uninterrupted: Path,
    run: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_losses_nan(monkeypatch, {SECOND})
    restoring = tiny("advmoe", epochs=2, tied_share=0.0, on_nonfinite="restore")
    train(restoring, splits, run, recorder, resume=True)
    (note,) = [note for note in recorder.notes if "not finite" in note]
    assert "back to epoch-0001" in note
    assert note.endswith("(1 of 3)")
    history, expected = history_without_seconds(run), history_without_seconds(uninterrupted)
    assert history[0] == expected[0]
    assert history[1]["router_lr"] == expected[1]["router_lr"] / 2
    assert history[1]["lr"] == expected[1]["lr"]


@pytest.mark.parametrize(
    "rest",
    [{"epochs": 1, "tied_share": 1.0}, {"epochs": 2, "tied_share": 0.0, "router_target": "confusion", "router_loss": "target"}],
)
def test_after_a_nan_while_no_router_learns_every_rate_is_half(
    rest: dict[str, Any],
    tiny: Callable[..., RunConfig],
    splits: Splits,
    tmp_path: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_losses_nan(monkeypatch, {SECOND})
    row, *_ = train(tiny("advmoe", lr=0.1, on_nonfinite="restore", **rest), splits, tmp_path / "run", recorder)
    (note,) = [note for note in recorder.notes if "not finite" in note]
    assert note.endswith("with half the rate (1 of 3)")
    assert row["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 2 / (3 * rest["epochs"]))))


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_nan_that_recurs_stops_the_run_after_three_restores(
    epoch: int, tiny: Callable[..., RunConfig], splits: Splits, run: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_losses_nan(monkeypatch, set(range(SECOND, 1000)))
    if epoch == 1:
        shutil.rmtree(run)
    restoring = tiny("advmoe", epochs=2, tied_share=0.0, on_nonfinite="restore")
    with pytest.raises(UserError, match=r"loss .* is not finite \(after 3 restores\); last good checkpoint: "):
        train(restoring, splits, run, recorder, resume=epoch == 2)
    assert len([note for note in recorder.notes if "not finite" in note]) == 3
