"""One run as a process of its own: killed with its parent, alone on its folder, its last word kept."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from advmoe.config import dump_yaml
from advmoe.errors import UserError
from advmoe.runs.status import FAILED, LOG, State, read_run
from advmoe.sweep.job import commands, ending, start, stop

PARENT = """
import pickle, sys, time
from advmoe.sweep.job import start
start(pickle.loads(bytes.fromhex(sys.argv[1])))
time.sleep(600)
"""


def pid_of(folder):
    """Of the process that works in `folder`, once it holds the lock."""
    while not (folder / LOG).exists() or ", process " not in (folder / LOG).read_text():
        time.sleep(0.02)
    return int((folder / LOG).read_text().splitlines()[0].rpartition(" ")[2])


def stop_one(process):
    stop([process])


def lives(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_run_is_trained_and_evaluated(job, figures):
    one = job()
    process = start(one)
    assert process.wait() == 0
    stop([process])
    assert ending(one, 0) is None
    assert read_run(one.folder, one.preset).state is State.DONE
    assert commands(one) == []
    assert figures(one.folder)["flags"].count("0") + figures(one.folder)["flags"].count("1") == 10


def test_work_continues_where_it_was(job):
    one = job()
    words = commands(one)
    assert [command[0] for command in words] == ["train", "evaluate"]
    assert "--resume" in words[0]
    assert words[1][2:4] == ["--attacks", "pgd_10"]
    assert "--quick" in commands(replace(one, preset=("quick",)))[1]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_it_ends_with_a_parent_that_is_killed(job):
    one = job(epochs=500)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, pickle.dumps(one).hex()])
    pid = pid_of(one.folder)
    assert lives(pid)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while lives(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(pid)


def test_the_second_waits_and_finds_the_work_done(job):
    one = job()
    processes = [start(one), start(one)]
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        stop([process])
    log = (one.folder / LOG).read_text()
    assert log.count("epoch 1/1") == 1


def test_the_line_of_a_failed_run_is_kept_until_it_is_started_again(job):
    one = job(method="advmoe", batch_size=40)
    process = start(one)
    line = ending(one, process.wait())
    stop([process])
    assert line == "batch_size must be at most half of the 60 training images for two levels, not 40"
    assert read_run(one.folder).reason == line
    stop_one(start(one))
    assert not (one.folder / FAILED).exists()


def test_a_killed_process_says_by_what(job):
    one = job()
    process = start(one)
    process.send_signal(signal.SIGKILL)
    assert ending(one, process.wait()) == "killed by SIGKILL (out of memory?)"
    stop([process])


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_threads_are_the_jobs_share(job, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one = job().at("cpu", 1)
    process = start(one)
    environment = Path(f"/proc/{pid_of(one.folder)}/environ").read_text().split("\0")  # not earlier: it is empty during exec
    stop([process])
    assert "OMP_NUM_THREADS=1" in environment


def test_a_folder_of_another_run_or_of_none_is_refused(job):
    stop_one(start(job()))
    with pytest.raises(UserError, match=r"holds another run \(training.epochs: 1, not 2\)"):
        start(job(epochs=2))
    strange = job("strange")
    strange.folder.mkdir()
    (strange.folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is neither an empty folder"):
        start(strange)
    assert [path.name for path in strange.folder.iterdir()] == ["thesis.tex"]


def test_what_a_killed_claim_left_is_no_obstacle(job):
    one = job()
    one.folder.mkdir()
    (one.folder / ".config.yaml.123.draft").write_text("half")
    stop_one(start(one))
    assert (one.folder / "config.yaml").exists()


def test_two_sweeps_that_claim_one_folder_take_turns(job):
    """One that holds a half-written configuration while another comes must find it when it goes on."""
    one = job()
    (one.folder / "x").parent.mkdir()
    draft = one.folder / ".config.yaml.123.draft"
    with FileLock(one.folder.parent / ".lock"):
        draft.write_text("half")
        other = threading.Thread(target=lambda: stop_one(start(one)))
        other.start()
        time.sleep(0.5)
        assert draft.exists()
        draft.replace(one.folder / "config.yaml")
        (one.folder / "config.yaml").write_text(dump_yaml(one.config))
    other.join()
    assert read_run(one.folder).state is not State.FAILED
    assert (one.folder / LOG).exists()


def test_path_and_device_are_no_part_of_the_run(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = job()
    one = replace(one, config=one.config.replace(data=one.config.data.replace(data_dir="here", workers=None)))
    placed = one.at("cuda:1", 3)
    assert placed.config.data.data_dir == str(tmp_path / "here")
    assert (placed.config.runtime.device, placed.config.runtime.threads, placed.config.data.workers) == ("cuda:1", 3, 3)
    assert json.dumps(commands(placed)).count("cuda:1") == 2
