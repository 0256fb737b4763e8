"""How a machine is divided among jobs, and how jobs end."""

import subprocess
import sys
from pathlib import Path

import pytest

from advmoe.errors import UserError
from advmoe.sweep import schedule
from advmoe.sweep.placements import Request, local
from advmoe.sweep.placements.local import LocalPlacement
from advmoe.sweep.schedule import drive


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, devices): a machine of that size."""

    def make(cores, devices=0):
        monkeypatch.setattr(local, "cores", lambda: cores)
        monkeypatch.setattr(local.torch.cuda, "device_count", lambda: devices)

    return make


@pytest.fixture
def started(monkeypatch):
    """Jobs are processes that end at once with the status in their name; a list of their names, devices and threads."""
    jobs = []

    def start(job):
        if job.name == "refused":
            raise UserError("refused: holds another run")
        jobs.append((job.name, job.config.runtime.device, job.config.runtime.threads))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({job.name[-1]})"], stdin=subprocess.PIPE)

    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(local, "record_failure", lambda job, status: f"status {status}" if status else None)
    monkeypatch.setattr(schedule, "POLL", 0.01)
    return jobs


@pytest.mark.parametrize(
    ("cores", "devices", "options", "workers", "threads", "free"),
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
def test_devices_and_threads_are_divided_among_workers(machine, cores, devices, options, workers, threads, free):
    machine(cores, devices)
    placement = LocalPlacement(Request(9, Path("runs"), **options))
    assert (placement.workers, placement.threads, list(placement.free)) == (workers, threads, free)


def test_no_more_workers_than_runs(machine):
    machine(16)
    assert LocalPlacement(Request(1, Path("runs"))).threads == 16


@pytest.mark.parametrize(
    ("workers", "threads", "message"),
    [(3, 0, "workers must be at most the number of cores, 2, not 3"), (2, 2, "2 workers of 2 threads")],
)
def test_more_than_the_machine_has_is_refused(machine, workers, threads, message):
    machine(2)
    with pytest.raises(UserError, match=message):
        LocalPlacement.check(Request(9, Path("runs"), workers, threads))


def test_failed_runs_are_named_and_the_rest_continue(job, started, machine):
    refreshes = []
    jobs = [job(name) for name in ("a0", "b3", "refused", "c0", "d1")]
    machine(2, 2)
    outcome = drive(LocalPlacement(Request(5, Path("runs"))), jobs, lambda: refreshes.append(None))
    assert outcome.remaining == ()
    assert outcome.failed == {"b3": "status 3", "refused": "refused: holds another run", "d1": "status 1"}
    assert sorted(name for name, _, _ in started) == ["a0", "b3", "c0", "d1"]
    assert {device for _, device, _ in started} == {"cuda:0", "cuda:1"}
    assert {threads for _, _, threads in started} == {1}
    assert refreshes


def test_no_more_run_than_there_are_workers_and_closing_ends_them(job, monkeypatch, machine):
    processes = []

    def start(job):
        processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return processes[-1]

    monkeypatch.setattr(local, "start", start)
    machine(2)
    placement = LocalPlacement(Request(5, Path("runs"), device="cpu"))
    placement.submit([job(str(number)) for number in range(5)])
    assert placement.ended() == {}
    assert len(processes) == 2
    assert all(process.poll() is None for process in processes)
    placement.close()
    assert all(process.returncode == -15 for process in processes)
    assert placement.ended() == {}
    assert len(processes) == 2


class Clock:
    """A stand-in for the module `time`, on which nothing but sleeping takes time."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_when_the_time_is_up_jobs_are_stopped_and_none_is_started(job, monkeypatch, machine):
    processes = []

    def start(job):
        processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return processes[-1]

    machine(2)
    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(schedule, "time", clock := Clock())
    placement, jobs = LocalPlacement(Request(3, Path("runs"), device="cpu")), [job(str(number)) for number in range(3)]
    outcome = drive(placement, jobs, lambda: None, 0.3)
    assert clock.now == pytest.approx(0.3)
    assert (outcome.failed, outcome.remaining) == ({}, ("0", "1", "2"))
    assert [process.returncode for process in processes] == [-15, -15]
    assert drive(placement, jobs, lambda: None, clock.now).remaining == ("0", "1", "2")
    assert len(processes) == 2


def test_a_job_that_ends_just_before_the_time_is_up_does_not_remain(job, monkeypatch, machine):
    processes = []

    def start(job):
        processes.append(subprocess.Popen([sys.executable, "-c", "raise SystemExit(input())"], stdin=subprocess.PIPE))
        return processes[-1]

    def end_first_job(seconds):
        clock.now += seconds
        if not processes[0].stdin.closed:
            processes[0].communicate(b"out of memory")

    machine(2)
    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(local, "record_failure", lambda job, status: f"status {status}" if status else None)
    monkeypatch.setattr(schedule, "time", clock := Clock())
    monkeypatch.setattr(clock, "sleep", end_first_job)
    placement = LocalPlacement(Request(3, Path("runs"), device="cpu"))
    outcome = drive(placement, [job(str(number)) for number in range(3)], lambda: None, 0.3)
    assert (outcome.failed, outcome.remaining) == ({"0": "status 1"}, ("1", "2"))
    assert len(processes) == 2
