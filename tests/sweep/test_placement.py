"""Shares of a machine, and jobs that end one way or another."""

import subprocess
import sys

import pytest

from advmoe.errors import UserError
from advmoe.sweep import placement
from advmoe.sweep.placement import Local, drive, local


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, devices): a machine of that size."""

    def make(cores, devices=0):
        monkeypatch.setattr(placement, "cores", lambda: cores)
        monkeypatch.setattr(placement.torch.cuda, "device_count", lambda: devices)

    return make


@pytest.fixture
def started(monkeypatch):
    """Jobs start as processes that end at once with the status in their name; gives the names, devices and threads."""
    seen = []

    def start(job):
        if job.name == "refused":
            raise UserError("refused: holds another run")
        seen.append((job.name, job.config.runtime.device, job.config.runtime.threads))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({job.name[-1]})"], stdin=subprocess.PIPE)

    monkeypatch.setattr(placement, "start", start)
    monkeypatch.setattr(placement, "ending", lambda job, status: f"status {status}" if status else None)
    monkeypatch.setattr(placement, "POLL", 0.01)
    return seen


@pytest.mark.parametrize(
    ("cores", "devices", "asked", "workers", "threads", "places"),
    [
        (2, 0, {}, 2, 1, ["cpu"] * 2),
        (16, 0, {}, 4, 4, ["cpu"] * 4),
        (16, 0, {"workers": 3}, 3, 5, ["cpu"] * 3),
        (16, 0, {"threads": 2}, 4, 2, ["cpu"] * 4),
        (2, 0, {"threads": 2}, 1, 2, ["cpu"]),
        (16, 1, {}, 1, 16, ["cuda"]),
        (16, 4, {}, 4, 4, [f"cuda:{number}" for number in range(4)]),
        (16, 2, {"workers": 4}, 4, 4, ["cuda:0", "cuda:1"] * 2),
        (16, 2, {"device": "cuda:1"}, 1, 16, ["cuda:1"]),
        (16, 2, {"device": "cpu"}, 4, 4, ["cpu"] * 4),
    ],
)
def test_devices_and_threads_are_shared_out(machine, cores, devices, asked, workers, threads, places):
    machine(cores, devices)
    found = local(9, **{"workers": None, "threads": 0, "device": "auto", **asked})
    assert (found.workers, found.threads, list(found.places)) == (workers, threads, places)


def test_no_more_workers_than_runs(machine):
    machine(16)
    assert local(1, None, 0, "auto").threads == 16


@pytest.mark.parametrize(
    ("workers", "threads", "said"),
    [(3, 0, "workers must be at most the number of cores, 2, not 3"), (2, 2, "2 workers of 2 threads")],
)
def test_more_than_the_machine_has_is_refused(machine, workers, threads, said):
    machine(2)
    with pytest.raises(UserError, match=said):
        local(9, workers, threads, "auto")


def test_failed_runs_are_told_and_the_rest_go_on(job, started):
    looks = []
    jobs = [job(name) for name in ("a0", "b3", "refused", "c0", "d1")]
    failed = drive(Local(2, 1, ["cuda:0", "cuda:1"]), jobs, lambda: looks.append(None))
    assert failed == {"b3": "status 3", "refused": "refused: holds another run", "d1": "status 1"}
    assert sorted(name for name, _, _ in started) == ["a0", "b3", "c0", "d1"]
    assert {place for _, place, _ in started} == {"cuda:0", "cuda:1"}
    assert {threads for _, _, threads in started} == {1}
    assert looks


def test_no_more_run_than_there_are_workers_and_closing_ends_them(job, monkeypatch):
    processes = []

    def start(job):
        processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return processes[-1]

    monkeypatch.setattr(placement, "start", start)
    place = Local(2, 1, ["cpu"])
    place.submit([job(str(number)) for number in range(5)])
    assert place.ended() == {}
    assert len(processes) == 2
    assert all(process.poll() is None for process in processes)
    place.close()
    assert all(process.returncode == -9 for process in processes)
    assert place.ended() == {}
    assert len(processes) == 2
