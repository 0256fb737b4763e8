"""torchrun from the command line: training that loses a rank, training resumed with another number of ranks, and evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advmoe.training.checkpoint import RunFolder

pytestmark = pytest.mark.slow
RECIPE = [
    "--recipe", "fashion-mnist-resnet18-advmoe", "--width", "4", "--limit-train", "60", "--limit-test", "20", "--batch-size", "20",
    "--epsilon", "0.1", "--num-steps", "1", "--epochs", "3", "--device", "cpu", "--threads", "1", "--dispatch", "split",
]  # fmt: skip
TIMES = ("train_seconds", "validate_seconds")


def torchrun(*args, processes=2, restarts=0):
    launch = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", "advmoe"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip


def wait_for(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(run):
    return load_file(RunFolder(run).latest().folder / "model.safetensors")


def ranks_of(launcher):
    """Process ids of the launcher's ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("torchrun") / "run"
    wait_for(torchrun("train", *RECIPE, "--out", run))
    return run


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_lost_a_rank_gives_the_same_result(rank, uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = torchrun("train", *RECIPE, "--save-minutes", 0, "--out", run, restarts=1)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/epoch-0001-00000[12]")):  # in the second epoch
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    wait_for(process)
    assert metrics(run) == metrics(uninterrupted)
    assert all(torch.equal(value, weights(uninterrupted)[name]) for name, value in weights(run).items())
    assert not list(run.rglob("*draft*"))


def test_checkpoints_continue_with_another_number_of_ranks(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = torchrun("train", *RECIPE, "--save-minutes", 0, "--out", run)
    while not list(run.glob("checkpoints/epoch-0001-00000[12]")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert RunFolder(run).latest().epoch < 3
    wait_for(torchrun("train", *RECIPE, "--out", run, "--resume", processes=1))
    one_rank, two_ranks = metrics(run), metrics(uninterrupted)
    assert len(one_rank) == 3
    assert one_rank[0] == two_ranks[0]


def test_shards_of_all_ranks_give_the_flags_of_one_process(uninterrupted):
    args = ["evaluate", uninterrupted, "--attacks", "pgd_10", "reroute", "--shard-size", 6, "--device", "cpu", "--threads", 1]
    records = []
    for processes in (2, 1):
        wait_for(torchrun(*args, "--fresh", processes=processes))
        record = json.loads((uninterrupted / "record.json").read_text())
        records.append([record["evaluation"][name] for name in ("flags", "broken", "figures")])
    assert records[0] == records[1]


def test_an_error_is_reported_once(uninterrupted):
    process = torchrun("train", *RECIPE, "--seed", 1, "--out", uninterrupted)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's exit status
    assert output.count("advmoe: error:") == 1
    assert "holds another run (seed: 0, not 1)" in output
