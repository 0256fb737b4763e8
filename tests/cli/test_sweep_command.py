"""`advmoe sweep` as a person meets it: planned, killed and run again, interrupted, refused in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from advmoe.cli import sweep
from advmoe.cli.arguments.sweep import read
from advmoe.config import differences, from_dict
from advmoe.errors import UserError
from advmoe.runs.status import State, read_run
from advmoe.sweep import schedule
from advmoe.sweep.estimate import Pace, Probe
from advmoe.sweep.folder import PROBE
from advmoe.training.checkpoint import RunFolder

GRID = "methods: [at_small_dense, at_moe]\ndatasets: [fashion-mnist]\nbackbones: [vgg16_bn]\nseeds: 1\n"
TINY = ["--width", "4", "--limit-train", "60", "--limit-test", "8", "--epochs", "2", "--batch-size", "20", "--preset", "pgd_10"]
TINY += ["--device", "cpu", "--threads", "1", "--workers", "1"]
NAMES = ["fashion-mnist-vgg16_bn-at_small_dense-s0", "fashion-mnist-vgg16_bn-at_moe-s0"]
MAIN = "import sys; from advmoe.cli.main import main; sys.exit(main(['sweep', *sys.argv[1:]]))"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(words):
    sweep.run(read(words))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(GRID)
    return str(path)


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory):
    """A sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    run([grid, "--out", str(out), *TINY])
    return out


def figures(out):
    """Every run's Record but for the times."""
    found = {}
    for name in NAMES:
        record = json.loads((out / name / "record.json").read_text())
        evaluation = record["evaluation"]
        evaluation["attacks"] = {attack: {**one, "seconds": 0} for attack, one in evaluation["attacks"].items()}
        found[name] = {"evaluation": evaluation, "sa": record["sa"], "epoch": record["epoch"], "seed": record["seed"]}
    return found


def started(*words):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()


def quiet(out):
    """Whether nothing is trained any more below `out`."""
    before = [path.stat().st_mtime_ns for path in sorted(out.rglob("metrics.jsonl"))]
    time.sleep(3)
    return before == [path.stat().st_mtime_ns for path in sorted(out.rglob("metrics.jsonl"))]


def test_plan_is_printed_with_costs_and_times_and_a_dry_run_writes_nothing(grid, tmp_path, capsys):
    run([grid, "--out", str(tmp_path / "runs"), *TINY, "--dry-run", "--seeds", "2", "--only", "at_moe"])
    shown = capsys.readouterr().out
    assert "fashion-mnist-vgg16_bn-at_moe-s1" in shown
    assert "at_small_dense" not in shown
    assert "GMACs" in shown
    assert "2 runs, 0 done; the other 2 take up to about" in shown
    assert "1 workers of 1 threads on cpu" in shown
    assert not (tmp_path / "runs").exists()


def test_dry_run_without_the_data_says_why_there_are_no_times(tmp_path, capsys):
    run(["a2", "--out", str(tmp_path / "runs"), "--dry-run", "--only", "wrn28_10", "s0"])
    shown = capsys.readouterr().out
    assert shown.count("cifar10-wrn28_10-") == 13
    assert "the time of the other 13 is unknown: cifar10 needs --data-dir" in shown


def test_a_sweep_leaves_runs_plan_and_records(whole):
    assert sorted(path.name for path in whole.iterdir()) == sorted([*NAMES, ".lock", ".probe.json", "sweep.yaml"])
    kept = yaml.safe_load((whole / "sweep.yaml").read_text())["runs"]
    assert list(kept) == NAMES
    for name in NAMES:
        assert read_run(whole / name, ("pgd_10",)).state is State.DONE
        assert differences(RunFolder(whole / name).config(), from_dict(kept[name]["config"])) == []
        assert kept[name]["preset"] == ["pgd_10"]


def test_killed_at_any_point_it_continues_and_gives_the_same_records(whole, grid, tmp_path):
    """Real SIGKILLs: in mid-training, then in the second run. With --minutes, a probe that is kept is not made again."""
    out = tmp_path / "runs"
    out.mkdir()
    shutil.copy(whole / PROBE, out)
    words = [grid, "--out", str(out), "--minutes", "30", *TINY]
    for name in NAMES:
        process = started(*words)
        wait_for(process, lambda name=name: read_run(out / name).epoch >= 1)
        process.kill()
        process.wait()
        assert not (out / NAMES[1] / "record.json").exists()
    run(words)
    assert figures(out) == figures(whole)


def test_nothing_is_run_twice_and_another_preset_only_adds(whole, grid, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    run([grid, "--out", str(whole), *TINY])
    assert "2 runs, 2 done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_slices_add_up_to_the_same_records(whole, grid, tmp_path, capsys, monkeypatch):
    """The clock is up after the first epoch of the first run; then another call does the rest."""
    out, records = tmp_path / "runs", tmp_path / "records.json"
    words = [grid, "--out", str(out), "--minutes", "5", "--records", str(records), *TINY]

    def stopped(placement, jobs, look, until):
        def late():
            look()
            if read_run(out / NAMES[0]).epoch >= 1:
                monkeypatch.setattr(schedule.time, "monotonic", lambda: until)

        return schedule.drive(placement, jobs, late, until)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "drive", stopped)
        with pytest.raises(SystemExit) as end:
            run(words)
    monkeypatch.undo()
    assert end.value.code == 75
    assert "2 runs remain; the same command continues" in capsys.readouterr().err
    done = [name for name in NAMES if (out / name / "record.json").exists()]  # one that ends while it is stopped, if any
    assert [record["run"] for record in json.loads(records.read_text() if done else "[]")] == done
    run(words)
    assert figures(out) == figures(whole)
    written = records.read_text()
    assert [record["run"] for record in json.loads(written)] == NAMES
    shutil.rmtree(out / NAMES[0])
    monkeypatch.setattr(sweep, "_run_missing", lambda *_: sys.exit(75))
    with pytest.raises(SystemExit):  # the Record of a lost folder stays
        run(words)
    assert records.read_text() == written


def test_a_slice_that_is_too_short_for_anything_says_so(grid, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run([grid, "--out", str(tmp_path / "runs"), "--minutes", "0.001", *TINY])
    assert end.value.code == 1
    assert "give more --minutes" in capsys.readouterr().err


def test_interrupted_it_stops_the_workers(grid, tmp_path):
    out = tmp_path / "runs"
    process = started(grid, "--out", out, *TINY, "--epochs", "500")
    wait_for(process, lambda: read_run(out / NAMES[0]).epoch >= 1)
    process.send_signal(signal.SIGINT)
    assert "interrupted; the same command continues where it stopped" in process.communicate(timeout=30)[1]
    assert quiet(out)


def test_a_failed_run_is_named_at_the_end_and_the_rest_continue(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID.replace("at_moe", "advmoe"))
    with pytest.raises(SystemExit) as end:
        run([str(grid), "--out", str(tmp_path / "runs"), *TINY, "--epochs", "1", "--batch-size", "40"])
    assert end.value.code == 1
    captured = capsys.readouterr()
    line = "batch_size must be at most half of the 60 training images for two levels, not 40"
    assert f"fashion-mnist-vgg16_bn-advmoe-s0: failed: {line}" in captured.out
    assert "fashion-mnist-vgg16_bn-at_small_dense-s0: done" in captured.out
    assert f"fashion-mnist-vgg16_bn-advmoe-s0: {line} (see" in captured.err
    assert "1 of 2 runs failed: fashion-mnist-vgg16_bn-advmoe-s0" in captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a3"], "unknown sweep 'a3', neither a file .* nor a table or figure of the paper: there is a1, a2"),
        (["a1", "--preset", "quik"], "unknown attack 'quik'"),
        (["a1", "--seeds", "0"], "seeds must be at least 1, not 0"),
        (["a1", "--seeds", "1001"], "seeds must be at most 1000, not 1001"),
        (["a1", "--workers", "0"], "workers must be at least 1, not 0"),
        (["a1", "--minutes", "0"], "minutes must be positive and finite, not 0.0"),
        (["a1", "--minutes", "nan"], "minutes must be positive and finite, not nan"),
        (["a1", "--records", "no/such/file.json"], "no/such: no such folder for the Records"),
        (["a1", "--address", "here"], "--address is for --placement ray or slurm"),
        (["a1", "--slurm", "a=b"], "--slurm is for --placement slurm"),
        (["a1"], "cifar10 needs --data-dir"),
        (["a1", "--only", "vgg"], "--only vgg: no run has this in its name"),
        (["a1", "--workers", "100000"], "workers must be at most the number of cores"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        run([*words, "--out", str(tmp_path / "runs"), "--device", "cpu"])
    assert not (tmp_path / "runs").exists()


def test_what_finished_runs_took_is_expected_of_the_others(whole, grid, capsys, monkeypatch):
    monkeypatch.setattr(Probe, "pace", lambda *_: Pace((1e6,), 1e6))
    run([grid, "--out", str(whole), *TINY, "--dry-run", "--seeds", "2"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the other 2 take" in line]
    assert " h " not in line


def test_a_dry_run_knows_submitits_parameters(grid, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    with pytest.raises(UserError, match="--slurm: submitit: Parameter 'a' need"):
        run([grid, "--out", str(tmp_path / "runs"), *TINY[:-2], "--placement", "slurm", "--slurm", "a=b", "--dry-run"])


def test_a_folder_with_another_configuration_is_refused_by_name(whole, grid):
    with pytest.raises(UserError, match=rf"{NAMES[0]}: holds another run \(training.epochs: 2, not 4\)"):
        run([grid, "--out", str(whole), *TINY, "--epochs", "4"])


def test_a_broken_plan_is_one_line(grid, tmp_path):
    (tmp_path / "sweep.yaml").write_text("runs: [")
    with pytest.raises(UserError, match=r"sweep\.yaml: not YAML"):
        run([grid, "--out", str(tmp_path), *TINY])
