"""`--deterministic`: two runs of one machine give the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import assert_same, trained

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ArgumentsOf = Callable[..., list[str | Path]]


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bits(
    threads: int, method: str, arguments_of: ArgumentsOf, tmp_path: Path, tried: Callable[..., Any]
) -> None:
    arguments, runs = arguments_of(method), [tmp_path / "first", tmp_path / "second"]
    with tried("two runs, --deterministic", method):
        for run in runs:
            trained(*arguments, "--out", run, "--deterministic", "--threads", str(threads))
        assert_same(*runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_runs_on_cuda(method: str, arguments_of: ArgumentsOf, tmp_path: Path) -> None:
    arguments, runs = arguments_of(method), [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        trained(*arguments, "--out", run, "--deterministic", "--device", "cuda")
    assert_same(*runs)
