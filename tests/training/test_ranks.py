"""Two gloo processes that share a batch train the same network as one process."""

import pytest
import torch
from filelock import FileLock
from three_iterations import CASES, after_three_iterations, on_two_ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, worker_id):
    """The results of two processes. The first of several test workers starts them, and the others read its file."""
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "two-ranks.pt"
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            on_two_ranks(out)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_parameters_after_three_iterations_are_those_of_one_process(case, two_ranks):
    torch.set_num_threads(1)
    one_rank, both_ranks = after_three_iterations(case), two_ranks[case]
    assert one_rank.keys() == both_ranks.keys()
    for name in one_rank:
        assert (one_rank[name] - both_ranks[name]).abs().max() < 1e-8, name


def test_a_rank_without_a_gradient_counts_as_zero(two_ranks):
    first, second, third = two_ranks["uneven gradients"]
    assert (first.tolist(), second.tolist(), third) == ([10], [100, 100], None)
