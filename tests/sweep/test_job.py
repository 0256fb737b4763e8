"""The process of one run: it ends with its parent, only one works on a folder, and the error that ended it is kept."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from small_backbone import SMALL

from advmoe import extension
from advmoe.config import dump_yaml
from advmoe.errors import UserError
from advmoe.evaluation.store import STORE
from advmoe.evaluation.store import _write as write_key
from advmoe.evaluation.target import SCHEMA
from advmoe.runs.failure import FAILED
from advmoe.runs.status import LOG, State, read_run
from advmoe.sweep.job import LOCK, commands, main, record_failure, start, stop
from advmoe.training.checkpoint import RunFolder

pytestmark = pytest.mark.usefixtures("small_processes")

PARENT = """
import pickle, sys, time
from advmoe.sweep.job import start
start(pickle.loads(bytes.fromhex(sys.argv[1])))
time.sleep(600)
"""


@pytest.fixture
def job(job):
    """job(name, **fields) of conftest.py, with the small backbone."""
    return partial(job, backbone=SMALL)


def pid_of(folder):
    """The id of the process that works in `folder`, once that holds the lock."""
    while not (folder / LOG).exists() or ", process " not in (folder / LOG).read_text():
        time.sleep(0.02)
    return int((folder / LOG).read_text().splitlines()[0].rpartition(" ")[2])


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_run_is_trained_and_evaluated_once_although_two_processes_start(job, figures):
    """The second process waits, and finds the work done."""
    run = job()
    processes, record = [start(run), start(run)], run.folder / "record.json"
    while not record.exists():
        time.sleep(0.02)
    written = record.stat().st_mtime_ns
    assert [process.wait() for process in processes] == [0, 0]
    stop(processes)
    assert record_failure(run, 0) is None
    assert record.stat().st_mtime_ns == written
    log = (run.folder / LOG).read_text()
    assert [log.count(text) for text in (", process ", "epoch 1/1", "$ advmoe evaluate")] == [2, 1, 1]
    assert read_run(run.folder, run.preset).state is State.DONE
    assert commands(run) == []
    assert figures(run.folder)["flags"].count("0") + figures(run.folder)["flags"].count("1") == 10


def test_the_commands_resume_training_and_evaluate_by_the_preset(job):
    run = job()
    train, evaluate = commands(run)
    assert train == ["train", "--out", str(run.folder), "--resume"]
    assert evaluate[0] == "evaluate"
    assert "--deterministic" not in evaluate
    assert evaluate[2:4] == ["--attacks", "pgd_10"]
    assert "--quick" in commands(replace(run, preset=("quick",)))[1]


@pytest.mark.parametrize(("schema", "fresh"), [(SCHEMA - 1, True), (SCHEMA, False)])
def test_results_of_an_older_version_are_computed_again(job, schema, fresh):
    run = job()
    (run.folder / STORE).mkdir(parents=True)
    write_key(run.folder / STORE / "key.json", {"schema": schema})
    assert ("--fresh" in commands(run)[1]) is fresh


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_the_process_has_the_jobs_threads_and_ends_when_its_parent_is_killed(job, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run = job(epochs=500)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, pickle.dumps(run).hex()])
    pid = pid_of(run.folder)
    assert is_running(pid)
    assert "OMP_NUM_THREADS=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")  # not earlier: it is empty during exec
    while read_run(run.folder).epoch < 1:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    assert "SIGTERM: finishing the current step, then saving" in (run.folder / LOG).read_text()


def test_the_line_of_a_failed_run_is_kept_until_it_is_started_again(job):
    run = job(method="advmoe", batch_size=40)
    process = start(run)
    line = record_failure(run, process.wait())
    stop([process])
    assert line == "batch_size must be at most half of the 60 training images for two levels, not 40"
    assert read_run(run.folder).reason == line
    stop([start(run)])
    assert not (run.folder / FAILED).exists()


def test_a_killed_process_says_by_what(job):
    run = job()
    process = start(run)
    process.send_signal(signal.SIGKILL)
    assert record_failure(run, process.wait()) == "killed by SIGKILL (out of memory?)"
    stop([process])


def test_a_folder_of_another_run_or_of_none_is_refused(job):
    stop([start(job())])
    with pytest.raises(UserError, match=r"holds another run \(training.epochs: 1, not 2\)"):
        start(job(epochs=2))
    other = job("other")
    other.folder.mkdir()
    (other.folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is neither an empty folder"):
        start(other)
    assert [path.name for path in other.folder.iterdir()] == ["thesis.tex"]


def test_a_draft_that_a_killed_process_left_does_not_prevent_a_start(job):
    run = job()
    run.folder.mkdir()
    (run.folder / ".config.yaml.123.draft").write_text("half")
    stop([start(run)])
    assert (run.folder / "config.yaml").exists()


def test_two_sweeps_that_claim_one_folder_take_turns(job):
    """A sweep that has written half of a configuration still finds its draft, although another sweep started the same job."""
    run = job()
    (run.folder / "x").parent.mkdir()
    draft = run.folder / ".config.yaml.123.draft"
    with FileLock(run.folder.parent / LOCK):
        draft.write_text("half")
        thread = threading.Thread(target=lambda: stop([start(run)]))
        thread.start()
        time.sleep(0.5)
        assert draft.exists()
        draft.replace(run.folder / "config.yaml")
        (run.folder / "config.yaml").write_text(dump_yaml(run.config))
    thread.join()
    assert read_run(run.folder).state is not State.FAILED
    assert (run.folder / LOG).exists()


def test_settings_that_may_change_are_those_of_the_last_call(job):
    """The process reads them from config.yaml."""
    run = job()
    stop([start(run)])
    training = run.config.training.replace(on_nonfinite="restore")
    runtime = run.config.runtime.replace(save_minutes=1.0, compile="inductor", deterministic=True)
    changed = replace(run, config=run.config.replace(training=training, runtime=runtime))
    stop([start(changed)])
    assert RunFolder(run.folder).config() == changed.config
    assert "--deterministic" in commands(changed)[1]


def test_path_and_device_of_a_placement(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = job()
    run = replace(run, config=run.config.replace(data=run.config.data.replace(data_dir="here", workers=None)))
    placed = run.at("cuda:1", 3)
    assert placed.config.data.data_dir == str(tmp_path / "here")
    assert (placed.config.runtime.device, placed.config.runtime.threads, placed.config.data.workers) == ("cuda:1", 3, 3)
    assert commands(placed)[1][4:6] == ["--device", "cuda:1"]


def test_the_process_knows_the_attacks_that_a_users_script_adds(job, registries, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from advmoe.attacks.registry import ATTACKS\nATTACKS['mine'] = ATTACKS['pgd_10']\n", encoding="utf-8"
    )
    executed = []
    monkeypatch.setenv(extension.VARIABLE, str(tmp_path / "mine.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(extension, "_loaded", set())
    monkeypatch.setattr("advmoe.sweep.job.end_with_parent", lambda: None)
    monkeypatch.setattr("advmoe.sweep.job._status", executed.append)
    run = job()
    RunFolder(run.folder).claim(run.config, resume=False)
    main(str(run.folder), "pgd_10", "mine")
    assert [argv[0] for argv in executed] == ["train", "evaluate"]
    assert executed[1][2:5] == ["--attacks", "pgd_10", "mine"]


# A folder that is removed while its run is going on


def test_a_removed_folder_is_no_error_when_its_run_ends(job):
    run = job()
    assert not run.folder.exists()
    assert record_failure(run, 2) == "ended without a message"
    assert record_failure(run, -signal.SIGTERM) == "killed by SIGTERM"
    assert not run.folder.exists()
