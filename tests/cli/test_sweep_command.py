"""`advmoe sweep`: the plan, a sweep that is stopped or killed and continues, an interrupt, and errors of one line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from small_backbone import SMALL

from advmoe.cli import sweep
from advmoe.cli.main import main
from advmoe.cli.parsing import read
from advmoe.errors import UserError
from advmoe.runs.status import LOG, State, read_run
from advmoe.sweep import estimate, job, schedule
from advmoe.sweep.estimate import Pace, Probe
from advmoe.training.checkpoint import RunFolder

pytestmark = pytest.mark.usefixtures("small_processes")

GRID = f"methods: [at_small_dense, at_moe]\ndatasets: [fashion-mnist]\nbackbones: [{SMALL}]\nseeds: 1\n"
GRID += "settings: {attack: {num_steps: 1}}\n"
TINY = ["--width", "4", "--limit-train", "60", "--limit-test", "8", "--epochs", "4", "--batch-size", "40", "--preset", "pgd_10"]
TINY += ["--device", "cpu", "--threads", "1", "--workers", "1"]
NAMES = [f"fashion-mnist-{SMALL}-at_small_dense-s0", f"fashion-mnist-{SMALL}-at_moe-s0"]


def run(argv):
    sweep.run(read("sweep", argv))


@contextlib.contextmanager
def in_process():
    """The commands of a job run in the tests' process, which has imported everything. A process ends with their status."""

    def run_here(argv, stdout, **_):
        with open(stdout.fileno(), "w", closefd=False) as log, redirect_stdout(log), redirect_stderr(log):
            folder, preset = Path(argv[3]), tuple(argv[4:])
            work = job.commands(job.Job(folder, RunFolder(folder).config(), preset))
            status = next(filter(None, map(main, work)), 0)
        return subprocess.Popen(["sh", "-c", f"exit {status}"], stdin=subprocess.PIPE)

    with patch.object(job, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": run_here})):
        yield


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Shorter probes and waits."""
    with patch.object(estimate, "MIN_SECONDS", 0.0), patch.object(schedule, "POLL", 0.02):
        yield


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(GRID)
    return str(path)


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory):
    """The folder of a sweep that ran without interruption."""
    out = tmp_path_factory.mktemp("finished") / "runs"
    with in_process():
        run([grid, "--out", str(out), *TINY])
    return out


def results(out):
    """What every run's Record says, without the times."""
    results = {}
    for name in NAMES:
        record = json.loads((out / name / "record.json").read_text())
        evaluation = record["evaluation"]
        evaluation["attacks"] = {name: {**attack, "seconds": 0} for name, attack in evaluation["attacks"].items()}
        results[name] = {"evaluation": evaluation, "sa": record["sa"], "epoch": record["epoch"], "seed": record["seed"]}
    return results


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()


def drive_until(condition, action):
    """A replacement for `drive` of the command that calls `action(until)` as soon as `condition` holds."""

    def drive(placement, jobs, refresh, until):
        def refresh_or_act():
            refresh()
            if condition():
                action(until)

        return schedule.drive(placement, jobs, refresh_or_act, until)

    return drive


def test_plan_is_printed_with_costs_and_times_and_a_dry_run_writes_nothing(grid, tmp_path, capsys):
    run([grid, "--out", str(tmp_path / "runs"), *TINY, "--dry-run", "--seeds", "2", "--only", "at_moe"])
    output = capsys.readouterr().out
    assert f"fashion-mnist-{SMALL}-at_moe-s1" in output
    assert "at_small_dense" not in output
    assert "GMACs" in output
    assert "2 runs, 0 done; the other 2 take up to about" in output
    assert "1 worker of 1 thread on cpu" in output
    assert not (tmp_path / "runs").exists()


def test_dry_run_without_the_data_says_why_there_are_no_times(tmp_path, capsys):
    run(["a2", "--out", str(tmp_path / "runs"), "--dry-run", "--only", "wrn28_10", "s0"])
    output = capsys.readouterr().out
    assert output.count("cifar10-wrn28_10-") == 13
    assert "the time of the other 13 is unknown: cifar10 needs --data-dir" in output


def test_a_sweep_leaves_runs_and_records(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted([*NAMES, ".lock", ".probe.json"])
    for name in NAMES:
        assert read_run(finished / name, ("pgd_10",)).state is State.DONE
        assert RunFolder(finished / name).config().training.epochs == 4


def test_out_of_time_then_killed_it_continues_and_gives_the_same_records(finished, grid, tmp_path, capsys, monkeypatch):
    """The first run is done. The time is over after an epoch of the second. The next sweep, a process, is killed (SIGKILL) an
    epoch later. A third call finishes. A probe that is kept is not made again with --minutes."""
    out, records = tmp_path / "runs", tmp_path / "records.json"
    first, second = (out / name for name in NAMES)
    shutil.copytree(finished / first.name, first)
    shutil.copy(finished / sweep.PROBE, out)
    argv = [grid, "--out", str(out), "--minutes", "30", "--records", str(records), *TINY]

    def end_the_time(until):
        monkeypatch.setattr(schedule.time, "monotonic", lambda: until)

    with monkeypatch.context() as patch:
        patch.setenv("PAUSE_AT", f"{second.name}/checkpoints/epoch-0002")  # so that it does not end before the time is over
        patch.setattr(sweep, "drive", drive_until(lambda: read_run(second).epoch >= 1, end_the_time))
        with pytest.raises(SystemExit) as end:
            run(argv)
    monkeypatch.undo()
    assert end.value.code == 75
    assert "1 run remains; the same command continues" in capsys.readouterr().err
    assert [record["run"] for record in json.loads(records.read_text())] == NAMES[:1]

    epoch, command = read_run(second).epoch, [sys.executable, "-m", "advmoe", "sweep", *argv]
    environment = {**os.environ, "PAUSE_AT": f"{second.name}/checkpoints/epoch-0004"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert epoch in (1, 2)
    wait_for(process, lambda: read_run(second).epoch >= epoch + 1)
    process.kill()
    process.communicate()
    assert not (second / "record.json").exists()

    run(argv)
    assert results(out) == results(finished)
    written = records.read_text()
    assert [record["run"] for record in json.loads(written)] == NAMES
    shutil.rmtree(first)
    monkeypatch.setattr(sweep, "_run_missing", lambda *_: sys.exit(75))
    with pytest.raises(SystemExit):  # the Record of a lost folder stays
        run(argv)
    assert records.read_text() == written


def test_nothing_is_run_twice_and_another_preset_only_adds(finished, grid, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    run([grid, "--out", str(finished), *TINY])
    assert "2 runs, 2 done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_records_that_another_sweep_wrote_meanwhile_stay(finished, grid, tmp_path, monkeypatch):
    records, plan_table = tmp_path / "records.json", sweep.plan_table
    other = {**json.loads((finished / NAMES[0] / "record.json").read_text()), "run": "other"}

    def plan_table_while_another_sweep_ends(*arguments):
        records.write_text(json.dumps([other]))
        return plan_table(*arguments)

    monkeypatch.setattr(sweep, "plan_table", plan_table_while_another_sweep_ends)
    run([grid, "--out", str(finished), "--records", str(records), *TINY])
    assert [record["run"] for record in json.loads(records.read_text())] == ["other", *NAMES]
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]


def test_records_of_other_runs_and_of_none_stay_as_they_are(finished, grid, tmp_path):
    """Records of schema 1 name no run. Records of one name can be of different data."""
    records = tmp_path / "records.json"
    record = json.loads((finished / NAMES[0] / "record.json").read_text())
    others = [{**record, "run": None, "sa": 1.0}, {**record, "run": None, "sa": 2.0}, {**record, "fingerprint": "other data"}]
    records.write_text(json.dumps(others))
    run([grid, "--out", str(finished), "--records", str(records), *TINY])
    written = json.loads(records.read_text())
    assert written[:3] == others
    assert [entry["run"] for entry in written[3:]] == NAMES


def test_a_record_is_replaced_by_a_newer_one_of_the_same_run(finished, grid, tmp_path):
    records = tmp_path / "records.json"
    record = json.loads((finished / NAMES[0] / "record.json").read_text())
    for time_, sa in (("2000-01-01T00:00:00+00:00", record["sa"]), ("3000-01-01T00:00:00+00:00", 1.0)):
        records.write_text(json.dumps([{**record, "time": time_, "sa": 1.0}]))
        run([grid, "--out", str(finished), "--records", str(records), *TINY])
        first, second = json.loads(records.read_text())
        assert (first["run"], first["sa"], second["run"]) == (NAMES[0], sa, NAMES[1])


def test_an_interrupt_leaves_the_records_as_they_are(finished, grid, tmp_path, monkeypatch):
    records = tmp_path / "records.json"
    record = json.loads((finished / NAMES[0] / "record.json").read_text())
    text = json.dumps([{**record, "run": None}, {**record, "run": None}])
    records.write_text(text)
    monkeypatch.setattr(sweep, "_run_missing", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run([grid, "--out", str(tmp_path / "runs"), "--records", str(records), *TINY])
    assert records.read_text() == text


def test_records_of_a_run_with_other_settings_are_refused_before_anything_is_written(finished, grid, tmp_path):
    records = tmp_path / "records.json"
    text = json.dumps([json.loads((finished / NAMES[0] / "record.json").read_text())])
    records.write_text(text)
    with pytest.raises(UserError, match=rf"has another run {NAMES[0]} \(training.epochs: 4, not 5\)"):
        run([grid, "--out", str(tmp_path / "runs"), "--records", str(records), *TINY, "--epochs", "5"])
    assert records.read_text() == text
    assert not (tmp_path / "runs").exists()


def test_a_slice_that_is_too_short_for_anything_says_so(grid, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run([grid, "--out", str(tmp_path / "runs"), "--minutes", "0.001", *TINY])
    assert end.value.code == 1
    assert "give more --minutes" in capsys.readouterr().err


def test_interrupted_it_stops_the_workers(grid, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "runs" / NAMES[0]
    drive = drive_until(lambda: read_run(folder).epoch >= 1, lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sweep, "drive", drive)
    assert main(["sweep", grid, "--out", str(tmp_path / "runs"), *TINY, "--epochs", "500", "--only", "at_small_dense"]) == 130
    assert "interrupted; the same command continues where it stopped" in capsys.readouterr().err
    (line,) = [line for line in (folder / LOG).read_text().splitlines() if ", process " in line]
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.rpartition(" ")[2]), 0)


def test_sigterm_ends_it_like_an_interrupt(finished, grid, tmp_path, capsys, monkeypatch):
    """The placement is closed, and the Records are written."""
    shutil.copytree(finished, tmp_path / "runs")
    handler, records = signal.getsignal(signal.SIGTERM), tmp_path / "records.json"
    monkeypatch.setattr(sweep, "_run_missing", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["sweep", grid, "--out", str(tmp_path / "runs"), "--records", str(records), *TINY, "--seeds", "2"]) == 143
    assert "interrupted by SIGTERM; the same command continues" in capsys.readouterr().err
    assert len(json.loads(records.read_text())) == 2
    assert signal.getsignal(signal.SIGTERM) == handler


def test_minutes_bound_the_probing(grid, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "PROBE_SHARE", 0.0)
    monkeypatch.setattr(Probe, "pace", lambda *_: pytest.fail("times a network"))
    run([grid, "--out", str(tmp_path / "runs"), *TINY, "--minutes", "5", "--dry-run"])
    assert "the time of the other 2 is unknown: the probing ended to leave time for the runs" in capsys.readouterr().out


def test_a_failed_run_is_named_at_the_end_and_the_rest_continue(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID.replace("at_moe", "advmoe"))
    with in_process(), pytest.raises(SystemExit) as end:
        run([str(grid), "--out", str(tmp_path / "runs"), *TINY, "--epochs", "1"])
    assert end.value.code == 1
    captured = capsys.readouterr()
    line = "batch_size must be at most half of the 60 training images for two levels, not 40"
    assert f"fashion-mnist-{SMALL}-advmoe-s0: failed: {line}" in captured.out
    assert f"fashion-mnist-{SMALL}-at_small_dense-s0: done" in captured.out
    assert f"fashion-mnist-{SMALL}-advmoe-s0: {line} (see" in captured.err
    assert f"1 of 2 runs failed: fashion-mnist-{SMALL}-advmoe-s0" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a3"], "unknown sweep 'a3', neither a file .* nor a table or figure of the paper: there is a1, a2"),
        (["a1", "--preset", "quik"], "unknown preset or attack 'quik': did you mean quick"),
        (
            ["a1", "--preset", "fastest"],
            "'fastest': the presets are quick, standard and full; attacks may be named instead, such as",
        ),
        (["a1", "--preset", "quick", "pgd_50"], "quick is a preset and cannot be in a list of attacks"),
        (["a1", "--seeds", "0"], "seeds must be at least 1, not 0"),
        (["a1", "--seeds", "1001"], "seeds must be at most 1000, not 1001"),
        (["a1", "--workers", "0"], "workers must be at least 1, not 0"),
        (["a1", "--minutes", "0"], "minutes must be positive and finite, not 0.0"),
        (["a1", "--minutes", "nan"], "minutes must be positive and finite, not nan"),
        (["a1", "--keep-images"], "--keep-images is for the file of --records"),
        (["a1", "--records", "no/such/file.json"], "no/such: no such folder for the Records"),
        (["a1", "--address", "here"], "--address is for --placement ray or slurm"),
        (["a1", "--slurm", "a=b"], "--slurm is for --placement slurm"),
        (["a1"], "cifar10 needs --data-dir"),
        (["a1", "--only"], r"--only needs a value \(see advmoe sweep --help\)"),
        (["a1", "--only", "vgg"], "--only vgg: no run has this in its name"),
        (["a1", "--workers", "100000"], "workers must be at most the number of cores"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        run([*argv, "--out", str(tmp_path / "runs"), "--device", "cpu"])
    assert not (tmp_path / "runs").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="runs: is a file; --out takes a folder"):
        run(["a1", "--out", str(tmp_path / "runs"), "--device", "cpu", "--dry-run"])


def test_the_times_of_finished_runs_are_expected_of_the_others(finished, grid, capsys, monkeypatch):
    monkeypatch.setattr(Probe, "pace", lambda *_: Pace((1e6,), 1e6))
    run([grid, "--out", str(finished), *TINY, "--dry-run", "--seeds", "2"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the other 2 take" in line]
    assert " h " not in line


@pytest.mark.extra
def test_a_dry_run_knows_submitits_parameters(grid, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    with pytest.raises(UserError, match="--slurm: submitit: Parameter 'a' need"):
        run([grid, "--out", str(tmp_path / "runs"), *TINY[:-2], "--placement", "slurm", "--slurm", "a=b", "--dry-run"])


def test_a_folder_with_another_configuration_is_refused_by_name(finished, grid):
    with pytest.raises(UserError, match=rf"{NAMES[0]}: holds another run \(training.epochs: 4, not 5\)"):
        run([grid, "--out", str(finished), *TINY, "--epochs", "5"])


# Records that cannot be read


def test_a_run_whose_record_cannot_be_read_is_evaluated_again(finished, grid, tmp_path):
    out, records = tmp_path / "runs", tmp_path / "records.json"
    shutil.copytree(finished, out)
    path = out / NAMES[0] / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gmacs": "x"}))
    with in_process():
        run([grid, "--out", str(out), "--records", str(records), *TINY])
    assert results(out) == results(finished)
    assert [record["run"] for record in json.loads(records.read_text())] == NAMES


def test_a_record_of_a_newer_version_stays_and_the_others_are_written(finished, grid, tmp_path, capsys):
    out, records = tmp_path / "runs", tmp_path / "records.json"
    shutil.copytree(finished, out)
    path = out / NAMES[0] / "record.json"
    newer = json.dumps({**json.loads(path.read_text()), "schema": 99})
    path.write_text(newer)
    with in_process(), pytest.raises(SystemExit):
        run([grid, "--out", str(out), "--records", str(records), *TINY])
    assert f"{NAMES[0]}: {path}: holds a Record of schema 99; " in capsys.readouterr().err
    assert path.read_text() == newer
    assert [record["run"] for record in json.loads(records.read_text())] == NAMES[1:]
