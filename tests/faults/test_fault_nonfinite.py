"""NaN and infinity in data, loss, router or gradient: the run stops and names the step, or restores a checkpoint, as configured."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import advmoe, assert_same, drafts, rows, trained

from advmoe.moe import MoEKind
from advmoe.training.checkpoint import RunFolder
from advmoe.training.methods import METHODS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEP = 5  # of 6 in two epochs: the second one's second
TENSORS = {  # the one named in the error, by the poisoned source
    "data": r"(images|logits of router 0|clean logits)",
    "loss": "loss",
    "router": "logits of router 0",
    "gradient": r"gradient of [\w.]+",
}
ArgumentsOf = Callable[..., list[str | Path]]


def poisoned(source: str, value: str, times: int = 1) -> dict[str, dict[str, Any]]:
    return {"poison": {"source": source, "value": value, "first": STEP, "times": times}}


def phases(method: str) -> int:
    return len(METHODS[method].phases)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("source", TENSORS)
def test_the_run_stops_and_names_the_step(
    source: str,
    value: str,
    method: str,
    arguments_of: ArgumentsOf,
    run: Path,
    unbroken: Callable[[str], Path],
    tried: Callable[..., Any],
) -> None:
    routed = isinstance(METHODS[method].kind(tiny_model()), MoEKind)
    if source == "router" and not routed:
        pytest.skip("has no router")
    arguments = arguments_of(method)
    with tried(f"NaN or infinity in the {source}", method):
        ended = advmoe(*arguments, faults=poisoned(source, value))
        assert ended.status == 2, ended.text
        where = rf"epoch 2: iteration 2 of 3: {TENSORS[source]} \(\w+ update\) is not finite"
        last = f"last good checkpoint: epoch-0001 in {run / 'checkpoints'}"
        assert re.fullmatch(rf"advmoe: error: {where}; {re.escape(last)}", ended.error_line), ended.error_line
        assert (run / "failed.txt").read_text().startswith("epoch 2: iteration 2 of 3")
        assert drafts(run) == []
        latest = RunFolder(run).latest()
        assert latest is not None
        assert (latest.epoch, latest.partial) == (1, None)
        trained(*arguments)
        assert_same(run, unbroken(method))


def tiny_model() -> Any:
    from advmoe.config import ModelConfig

    return ModelConfig(width=4)


def test_the_run_restores_a_checkpoint_and_lowers_the_rate(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    arguments = arguments_of(method, on_nonfinite="restore")
    with tried("NaN, with --on-nonfinite restore", method):
        ended = trained(*arguments, faults=poisoned("loss", "nan"))
        output = " ".join(ended.text.split())
        assert re.search(
            r"epoch 2: iteration 2 of 3: loss .* is not finite; back to epoch-0001 in .*half the (routers' )?rate \(1 of 3\)",
            output,
        )
        restored, expected = rows(run), rows(unbroken(method))
        assert restored[0] == expected[0]
        assert len(restored) == len(expected)
        lowered = "router_lr" if "router_lr" in expected[1] else "lr"
        assert restored[1][lowered] == pytest.approx(expected[1][lowered] / 2)
        assert math.isfinite(restored[1]["loss"])


def test_the_run_restores_three_times_at_most(method: str, arguments_of: ArgumentsOf, run: Path, tried: Callable[..., Any]) -> None:
    arguments = arguments_of(method, on_nonfinite="restore")
    with tried("NaN that comes back, with --on-nonfinite restore", method):
        ended = advmoe(*arguments, faults=poisoned("loss", "nan", times=99))
        assert ended.status == 2
        output = " ".join(ended.text.split())
        assert [number for number in "1234" if f"({number} of 3)" in output] == ["1", "2", "3"]
        assert ended.error.strip().splitlines()[-1].startswith("advmoe: error: epoch 2: iteration ")
        latest = RunFolder(run).latest()
        assert latest is not None
        assert latest.epoch == 1


def test_the_run_restores_the_start(arguments_of: ArgumentsOf, run: Path) -> None:
    """Before there is a checkpoint."""
    arguments = arguments_of("advmoe", on_nonfinite="restore")
    fault = {"poison": {"source": "loss", "value": "inf", "first": 2, "times": 1}}
    assert "rate (1 of 3)" in " ".join(trained(*arguments, faults=fault).text.split())
    assert [row["epoch"] for row in rows(run)] == [1, 2]


def test_the_number_of_restores_is_saved(arguments_of: ArgumentsOf, run: Path) -> None:
    arguments = arguments_of("advmoe", on_nonfinite="restore")
    trained(*arguments, faults={"poison": {"source": "loss", "value": "nan", "first": 2, "times": 1}})
    latest = RunFolder(run).latest()
    assert latest is not None
    assert latest.restores == 1
