"""Two gloo processes on one batch do what one process does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from three_iterations import CASES, after

SCRIPT = Path(__file__).parent / "three_iterations.py"


@pytest.fixture(scope="module")
def together(tmp_path_factory, worker_id):
    """What two processes compute. Of several test workers the first one starts them, and the others read its file."""
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "two-ranks.pt"
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            start(out)
    return torch.load(out, weights_only=True)


def start(out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=580)


@pytest.mark.parametrize("case", CASES)
def test_parameters_after_three_iterations_are_those_of_one_process(case, together):
    torch.set_num_threads(1)
    alone, both = after(case), together[case]
    assert alone.keys() == both.keys()
    for name in alone:
        assert (alone[name] - both[name]).abs().max() < 1e-8, name
