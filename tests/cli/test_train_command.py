"""`advmoe train`: what it writes, the evaluation of its run, and the errors of wrong arguments."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from refused_commands import refused
from small_backbone import SMALL

from advmoe import extension
from advmoe.cli.main import main

pytestmark = pytest.mark.usefixtures("small_processes")

TINY = ["--recipe", "demo-advmoe", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TINY += ["--backbone", SMALL, "--num-steps", "1", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


def test_a_run_is_not_trained_in_a_folder_whose_name_is_not_utf_8(tmp_path, capsys):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    assert r"run\udcff: the path must be UTF-8 text" in refused(capsys, "train", *TINY, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_train_writes_the_runs_folder(run):
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["epochs"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in (run / "checkpoints").iterdir()} <= {"epoch-0001", "epoch-0002"}


def test_a_finished_run_is_not_trained_further(run, capsys):
    assert main(["train", *TINY, "--out", str(run)]) == 0
    finished = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("finished: 2 epochs"))
    assert finished.endswith(" on 10 held-out images")


def test_the_next_command_can_be_pasted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--epochs", "1", "--out", "lr[best] x"]) == 0
    assert capsys.readouterr().out.endswith("\nnext: advmoe evaluate 'lr[best] x'\n")


def test_the_next_command_of_a_script_is_the_scripts(run, tmp_path, capsys, monkeypatch):
    script = tmp_path / "my entries.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my entries.py", "train"])
    monkeypatch.setenv(extension.VARIABLE, str(script))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script's folder is added
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert capsys.readouterr().out.endswith(f"\nnext: python 'my entries.py' evaluate {run}\n")


def test_resume_needs_no_recipe(run, capsys):
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert "finished: 2 epochs" in capsys.readouterr().out


def test_config_file_gives_the_same_run(run, tmp_path):
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "second")]) == 0
    first, second = ((folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in (run, tmp_path / "second"))
    assert json.loads(first)["loss"] == json.loads(second)["loss"]


def test_evaluate_prints_and_writes_a_record(run, capsys):
    assert main(["evaluate", str(run), "--json", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((run / "record.json").read_text())
    assert list(record["ra"]) == ["10", "20", "50"]
    assert record["ra"]["50"] <= record["ra"]["10"] + 10 <= record["sa"] + 10
    assert record["fingerprint"]
    assert record["config"]["method"] == "advmoe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["train", "--out", "x"], "give --recipe NAME"),
        (["train", "--recipe", "demo-advmo", "--out", "x"], "unknown recipe 'demo-advmo': did you mean demo-advmoe"),
        (["train", "--recipe", "demo-advmoe"], "missing --out (see advmoe train --help)"),
        ([*["train", "--out", "x"], *TINY, "--epoch", "3"], "did you mean --epochs?"),
        ([*["train", "--out", "x"], *TINY, "--epochs", "many"], "--epochs must be INT (see advmoe train --help)"),
        ([*["train", "--out", "x"], *TINY, "--lr", "high"], "--lr must be FLOAT (see advmoe train --help)"),
        (["demo", "--seed", "x"], "--seed must be INT (see advmoe demo --help)"),
        ([*["train", "--out", "x"], *TINY, "--width", "many"], "--width must be INT (see advmoe train --help)"),
        ([*["train", "--out", "x"], *TINY, "--bank", "own"], "--bank must be one of backbone, disjoint, not 'own'"),
        ([*["train", "--out", "x"], *TINY, "--epochs"], "--epochs needs a value"),
        ([*["train", "--out", "x"], *TINY, "--picture-size", "32"], "--picture-size is now --image-size"),
        ([*["train", "--out", "x"], *TINY, "--picture_size=32"], "is now --image-size"),
        ([*["train", "--out", "x"], *TINY, "stray"], "unknown argument 'stray'"),
        ([*["train", "--out", "x"], *TINY, "--epochs", "0"], "epochs must be at least 1, not 0"),
        ([*["train", "--out", "x"], *TINY, "--model-scale", "1.5"], "model_scale must be in (0, 1], not 1.5"),
        ([*["train", "--out", "x"], *TINY, "--model-scale", "0.1"], "leaves a layer of 4 channels none"),
        ([*["train", "--out", "x"], *TINY, "--num-experts", "0"], "num_experts must be in [1, 1000], not 0"),
        ([*["train", "--out", "x"], *TINY, "--method", "advmoo"], "unknown method 'advmoo': did you mean advmoe"),
        ([*["train", "--out", "x"], *TINY, "--backbone", "resnet81"], "unknown backbone 'resnet81': did you mean resnet18"),
        ([*["train", "--out", "x"], *TINY, "--dataset", "cifar"], "unknown dataset 'cifar': did you mean cifar10 or cifar100?"),
        ([*["train", "--out", "x"], *TINY, "--epsilon", "8/0"], "--epsilon"),
        ([*["train", "--out", "x"], *TINY, "--device", "tpu9"], "device 'tpu9' is not available here: give auto, cpu, cuda,"),
        (["train", "--recipe", "cifar10-resnet18-advmoe", "--out", "x"], "cifar10 needs --data-dir"),
        (["train", "--recipe", "cifar10-resnet18-advmoe", "--out", "x", "--data-dir", "nowhere"], "nowhere: no such file"),
        (["train", "--config", "no.yaml", "--out", "x"], "no.yaml: "),
        (["evaluate"], "missing RUN (see advmoe evaluate --help)"),
        (["evaluate", "nowhere"], "nowhere: no run's folder, no file, no name on the hub"),
        (["profile", "--recipe", "demo"], "unknown recipe 'demo'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write anywhere
    monkeypatch.setattr("advmoe.cli.train.load_dataset", lambda data: pytest.fail("reads the data"))
    line = refused(capsys, "train", *TINY, "--out", tmp_path / "run")
    assert line == f"advmoe: error: {tmp_path}: the run cannot be written to this folder\n"


def test_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "neither an empty folder" in refused(capsys, "train", *TINY, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checkpoint_of_another_model_is_refused(run, tmp_path, capsys):
    assert main(["train", *TINY, "--num-experts", "3", "--out", str(tmp_path / "run")]) == 0
    config = (run / "config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(config)
    assert "another model's weights" in refused(capsys, "evaluate", tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "1", "--out", str(out)]) == 0
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("epochs: 1", "epochs: 2"))

    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data.pkl: No space left on device")

    monkeypatch.setattr("advmoe.training.checkpoint.torch.save", full)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["epoch-0001"]


def test_a_killed_run_resumes_to_the_numbers_of_an_unbroken_run(tmp_path):
    """A real SIGKILL in the second epoch of a real process."""
    arguments = ["train", *TINY, "--epochs", "3", "--threads", "1"]

    def finish(out, *more):
        assert main([*arguments, "--out", str(out), *more]) == 0
        return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]

    losses = finish(tmp_path / "unbroken")
    command = [sys.executable, "-m", "advmoe", *arguments, "--out", str(tmp_path / "broken")]
    environment = {**os.environ, "PAUSE_AT": "broken/checkpoints/epoch-0002"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 1/3" in line:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "broken/checkpoints/epoch-0003").exists()
    assert finish(tmp_path / "broken", "--resume") == losses


def test_training_continues_when_nobody_reads_its_output(tmp_path):
    command = [sys.executable, "-m", "advmoe", "train", *TINY, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert " left" in process.stdout.readline()
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (0, "")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
