"""Trackers: the figures in TensorBoard and Weights & Biases after complete, killed and resumed runs."""

import importlib.util
import json
from collections import defaultdict

import pytest
import torch
from recorder import Recorder

from advmoe.cli.main import main
from advmoe.errors import UserError
from advmoe.training import trackers
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.trackers import Tracker, figures

TOTAL = 3  # iterations an epoch of the tiny runs has
TINY = ["--recipe", "demo-advmoe", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TINY += ["--num-steps", "1", "--epochs", "1", "--device", "cpu"]
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def tracked(name, config, splits, run, stop=lambda epoch, done: False, *, resume=False):
    """Train with a tracker that writes at every iteration. `stop` interrupts the run after the tracker wrote, as a kill would."""
    with Tracker(name, run, config, every=1) as tracker:
        return train(config, splits, run, tracker, Recorder(stop), resume=resume)


def interrupted(name, config, splits, run, epoch, done):
    with pytest.raises(KeyboardInterrupt):
        tracked(name, config, splits, run, lambda *position: position == (epoch, done))


def scalars(run):
    """Tag -> [(step, value)], read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def without_seconds(figures_of_tags):
    return {tag: values for tag, values in figures_of_tags.items() if not tag.endswith("seconds")}


# Without any library


class FileSink:
    """A tracker's sink that writes to files in `folder`."""

    def __init__(self, library, folder, config, written):
        self.path = folder / "page.jsonl"

    def write(self, content, step):
        with self.path.open("a") as file:
            file.write(json.dumps([step, content]) + "\n")

    def close(self):
        self.path.with_name("closed").touch()


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setitem(trackers.SINKS, "wandb", FileSink)
    monkeypatch.setitem(trackers.LIBRARIES, "wandb", "json")

    def read(run):
        return [json.loads(line) for line in (run / "wandb/page.jsonl").read_text().splitlines()]

    return read


def test_every_epochs_row_and_the_losses_in_between_are_written(page, tiny, splits, tmp_path):
    history = tracked("wandb", tiny(), splits, tmp_path / "run")
    steps = [step for step, _ in page(tmp_path / "run")]
    assert steps == list(range(1, 3 * TOTAL + 1))
    rows = [content for step, content in page(tmp_path / "run") if step % TOTAL == 0]
    assert rows == [figures(row) for row in history]
    assert (tmp_path / "run/wandb/closed").exists()


def test_losses_within_an_epoch_are_means_since_the_last_step_written(page, tmp_path, tiny):
    RunFolder(tmp_path / "run").claim(tiny(), resume=False)
    with Tracker("wandb", tmp_path / "run", tiny(), every=2) as tracker:
        for done, (loss, routers) in enumerate([(10.0, 4.0), (30.0, 8.0), (50.0, 8.0), (90.0, 28.0), (91.0, 28.0)], start=1):
            sums = {"loss": torch.tensor(loss), "router_loss": torch.tensor(routers), "router_images": torch.tensor(8.0 * done)}
            tracker.iteration(1, done, 6, sums, 20 * done)
    assert page(tmp_path / "run") == [
        [2, {"iteration/loss": 30 / 40, "iteration/router_loss": 8 / 16}],
        [4, {"iteration/loss": 60 / 40, "iteration/router_loss": 20 / 16}],
    ]


@pytest.mark.parametrize("save_minutes", [15.0, 0.0])  # 0: resumed within the epoch
@pytest.mark.parametrize(("method", "at"), [("advmoe", (1, 2)), ("advmoe", (2, 3)), ("at_sparse", (3, 1))])
def test_a_resumed_run_writes_the_same_figures_as_an_uninterrupted_one(method, at, save_minutes, page, tiny, splits, tmp_path):
    config = tiny(method, epochs=2, save_minutes=save_minutes)
    tracked("wandb", config, splits, tmp_path / "uninterrupted")
    interrupted("wandb", config, splits, tmp_path / "resumed", *at)
    tracked("wandb", config, splits, tmp_path / "resumed", resume=True)

    def numbers(run):
        return [[step, without_seconds(content)] for step, content in page(run)]

    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "uninterrupted")


def test_a_tracker_that_starts_late_writes_the_earlier_epochs_too(page, tiny, splits, tmp_path):
    config = tiny(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda *at: at == (2, 1)))
    tracked("wandb", config, splits, tmp_path / "run", resume=True)
    assert [step for step, _ in page(tmp_path / "run")] == [TOTAL, TOTAL + 1, TOTAL + 2, 2 * TOTAL]
    train(config, splits, tmp_path / "untracked", Recorder())
    tracked("wandb", config, splits, tmp_path / "untracked")
    assert [step for step, _ in page(tmp_path / "untracked")] == [TOTAL, 2 * TOTAL]


def test_a_run_that_saved_nothing_and_starts_again_with_other_settings_is_tracked_anew(page, tiny, splits, tmp_path):
    run = tmp_path / "run"
    interrupted("wandb", tiny(epochs=1), splits, run, 1, 2)
    (run / "wandb" / trackers.ID).write_text("the service's name of the first run")
    tracked("wandb", tiny(epochs=1, lr=0.2), splits, run)
    assert [step for step, _ in page(run)] == [1, 2, 1, 2, TOTAL]
    assert not (run / "wandb" / trackers.ID).exists()


def test_a_refused_run_writes_nothing(page, tiny, splits, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="neither an empty folder"):
        tracked("wandb", tiny(), splits, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_file_of_the_last_step_is_refused_in_one_line(page, tiny, splits, tmp_path):
    tracked("wandb", tiny(epochs=1), splits, tmp_path / "run")
    (tmp_path / "run/wandb/written.json").write_text('{"step"')
    with pytest.raises(UserError, match=r"written\.json: is damaged; remove .*wandb to track the run anew"):
        tracked("wandb", tiny(epochs=1), splits, tmp_path / "run")


def test_figures_are_flat_numbers():
    row = {
        "epoch": 2,
        "loss": 0.5,
        "load": [[0.25, 0.75]],
        "dead": [[], [1, 0]],
        "router_entropy": [0.5, 0.1],
        "confusion": [[9]],
        "router_groups": [0],
    }
    assert figures(row) == {
        "epoch/epoch": 2, "epoch/loss": 0.5, "epoch/load/0/0": 0.25, "epoch/load/0/1": 0.75, "epoch/dead": 2,
        "epoch/router_entropy/0": 0.5, "epoch/router_entropy/1": 0.1,
    }  # fmt: skip


def test_all_observers_follow_a_run_and_one_may_stop_it(tiny, splits, tmp_path):
    recorders = Recorder(), Recorder(lambda epoch, done: (epoch, done) == (2, 1))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), splits, tmp_path / "run", *recorders)
    assert [[row["epoch"] for row in recorder.rows] for recorder in recorders] == [[1], [1]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_refused_in_one_line_before_anything_is_written(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(trackers.LIBRARIES, name, "no_such_library")
    assert main(["train", *TINY, "--out", str(tmp_path / "run"), "--track", name]) == 2
    error = capsys.readouterr().err
    assert error == f"advmoe: error: --track {name} needs the library {name}: pip install 'advmoe[{name}]'\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_in_one_line(capsys, tmp_path):
    assert main(["train", *TINY, "--out", str(tmp_path / "run"), "--track", "excel"]) == 2
    error = capsys.readouterr().err
    assert "tensorboard" in error
    assert error.count("\n") == 1


# TensorBoard


@needs_tensorboard
def test_tensorboard_files_have_the_rows(tiny, splits, tmp_path):
    history = tracked("tensorboard", tiny(), splits, tmp_path / "run")
    values = scalars(tmp_path / "run")
    assert [step for step, _ in values["iteration/loss"]] == [1, 2, 4, 5, 7, 8]
    for name in ("val_ra", "loss", "router_loss"):
        rows = [row for row in history if name in row]
        assert values[f"epoch/{name}"] == [(row["epoch"] * TOTAL, pytest.approx(row[name])) for row in rows]
    assert values["epoch/load/3/1"][-1] == (9, pytest.approx(history[-1]["load"][3][1]))


@needs_tensorboard
def test_a_resumed_run_has_every_step_once_in_tensorboard(tiny, splits, tmp_path):
    config = tiny(epochs=2)
    tracked("tensorboard", config, splits, tmp_path / "uninterrupted")
    interrupted("tensorboard", config, splits, tmp_path / "resumed", 2, 2)
    assert [step for step, _ in scalars(tmp_path / "resumed")["iteration/loss"]] == [1, 2, 4, 5]
    tracked("tensorboard", config, splits, tmp_path / "resumed", resume=True)
    assert without_seconds(scalars(tmp_path / "resumed")) == without_seconds(scalars(tmp_path / "uninterrupted"))


@needs_tensorboard
def test_events_after_the_recorded_step_are_not_written_twice(tiny, splits, tmp_path):
    """After a kill between writing an event and recording its step."""
    run = tmp_path / "run"
    interrupted("tensorboard", tiny(), splits, run, 2, 2)
    (run / "tensorboard/written.json").write_text('{"step": 3}')
    tracked("tensorboard", tiny(), splits, run, resume=True)
    steps = defaultdict(list, {tag: [step for step, _ in values] for tag, values in scalars(run).items()})
    assert steps["iteration/loss"] == [1, 2, 4, 5, 7, 8]
    assert steps["epoch/val_ra"] == [3, 6, 9]


@needs_tensorboard
def test_train_command_tracks(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(out), "--track", "tensorboard"]) == 0
    assert scalars(out)["epoch/val_ra"][0][1] == pytest.approx(json.loads((out / "metrics.jsonl").read_text())["val_ra"])


# Weights & Biases, offline


@needs_wandb
@pytest.mark.extra
def test_a_resumed_offline_run_keeps_its_id(tiny, splits, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, parts = tmp_path / "run", []
    init, write = trackers.WeightsAndBiases.__init__, trackers.WeightsAndBiases.write
    monkeypatch.setattr(trackers.WeightsAndBiases, "__init__", lambda *args: (parts.append([]), init(*args))[1])
    monkeypatch.setattr(
        trackers.WeightsAndBiases, "write", lambda self, content, step: (parts[-1].append(step), write(self, content, step))[1]
    )
    interrupted("wandb", tiny(), splits, run, 2, 2)
    tracked("wandb", tiny(), splits, run, resume=True)
    run_id = (run / "wandb/id.txt").read_text()
    files = list((run / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert len(files) == 2
    assert all(b"epoch/val_ra" in file.read_bytes() for file in files)
    assert parts == [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
