"""A real Ray cluster on this machine; one of its workers is killed during a run."""

import os
import signal
import time
from pathlib import Path

import pytest

from advmoe.errors import UserError
from advmoe.runs.status import LOG, State, read_run
from advmoe.sweep import schedule
from advmoe.sweep.job import start, stop
from advmoe.sweep.placements import Request
from advmoe.sweep.schedule import drive

pytest.importorskip("ray", reason="needs the extra ray")
from advmoe.sweep.placements import ray as ray_placement  # needs the extra

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster():
    """A cluster of one CPU, so jobs run one after another."""
    placement = ray_placement.RayPlacement(Request(2, Path("runs"), 1, 1, "cpu"))
    yield placement
    placement.close()


def parent_of(folder):
    """The process that watches the job in `folder`: a Ray worker."""
    first = (folder / LOG).read_text().splitlines()[0]
    status = Path(f"/proc/{first.rpartition(' ')[2]}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_a_killed_worker_is_replaced_and_the_records_are_the_same(cluster, job, figures):
    references = [job(f"reference-{method}", method, epochs=4) for method in ("at_small_dense", "at_moe")]
    for reference in references:
        process = start(reference)
        assert process.wait() == 0
        stop([process])
    jobs = [job(f"ray-{method}", method, epochs=4) for method in ("at_small_dense", "at_moe")]
    killed = []

    def kill_during_training():
        status = read_run(jobs[0].folder)
        if not killed and 1 <= status.epoch < status.epochs:
            killed.append(parent_of(jobs[0].folder))
            assert b"ray" in Path(f"/proc/{killed[0]}/cmdline").read_bytes()
            os.kill(killed[0], signal.SIGKILL)

    assert drive(cluster, jobs, kill_during_training).failed == {}
    assert killed
    assert [figures(job.folder) for job in jobs] == [figures(reference.folder) for reference in references]
    log = (jobs[0].folder / LOG).read_text()
    assert log.count(", process ") == 2
    assert log.count("epoch 1/4") == 1  # what was trained before is not trained again


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_a_failed_run_is_reported_a_killed_process_is_replaced_and_closing_ends_the_rest(cluster, job, monkeypatch):
    monkeypatch.setattr(schedule, "POLL", 0.05)
    killed = []
    survivor, failing = job("survivor", epochs=3), job("failing", "advmoe", batch_size=40)

    def kill_the_process():
        if not killed and read_run(survivor.folder).epoch >= 1:
            killed.append(int((survivor.folder / LOG).read_text().splitlines()[0].rpartition(" ")[2]))
            os.kill(killed[0], signal.SIGKILL)

    failed = drive(cluster, [survivor, failing], kill_the_process).failed
    assert killed
    assert failed == {"failing": "batch_size must be at most half of the 60 training images for two levels, not 40"}
    assert read_run(survivor.folder).state is State.DONE
    endless = job("endless", epochs=5000)
    cluster.submit([endless])
    while read_run(endless.folder).epoch < 1:
        time.sleep(0.05)
    cluster.close()
    time.sleep(2)
    epoch = read_run(endless.folder).epoch
    time.sleep(3)
    assert read_run(endless.folder).epoch == epoch


def test_a_cluster_too_small_for_a_run_is_one_line(monkeypatch):
    closed, stand_in = [], ray_placement.ray
    nodes = [{"Alive": True, "Resources": {"GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    monkeypatch.setattr(stand_in, "init", lambda **options: None)
    monkeypatch.setattr(stand_in, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(stand_in, "nodes", lambda: nodes)
    monkeypatch.setattr(stand_in, "shutdown", lambda: closed.append(True))
    with pytest.raises(UserError, match=r"Ray cluster at auto: no node has the 2 CPUs of a run \(at most 0\)"):
        ray_placement.RayPlacement(Request(2, Path("runs"), None, 2, "cpu", "auto"))
    assert closed


def test_no_cluster_is_one_line():
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        ray_placement.RayPlacement(Request(2, Path("runs"), None, 1, "cpu", "127.0.0.1:1"))
    with pytest.raises(UserError, match="--workers is only for Ray on this machine"):
        ray_placement.RayPlacement(Request(2, Path("runs"), 2, 1, "cpu", "auto"))
