"""NaN and infinity in data, loss, router or gradient: the run stops at that step and names it, or goes back, as configured."""

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
NAMES = {  # of the tensor in which it is found
    "data": r"(images|logits of layer 0's router|clean logits)",
    "loss": "loss",
    "router": "logits of layer 0's router",
    "gradient": r"gradient of [\w.]+",
}
Words = Callable[..., list[str | Path]]


def poisoned(place: str, value: str, times: int = 1) -> dict[str, dict[str, Any]]:
    return {"poison": {"place": place, "value": value, "first": STEP, "times": times}}


def phases(method: str) -> int:
    return len(METHODS[method].phases)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", NAMES)
def test_it_stops_at_the_step_with_its_name(
    place: str, value: str, method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    routed = isinstance(METHODS[method].kind(tiny_model()), MoEKind)
    if place == "router" and not routed:
        pytest.skip("has no router")
    own = words(method)
    with tried(f"NaN or infinity in the {place}", method):
        ended = advmoe(*own, faults=poisoned(place, value))
        assert ended.status == 2, ended.said
        where = rf"epoch 2: iteration 2 of 3: {NAMES[place]} \(\w+ update\) is not finite"
        last = f"last good checkpoint: epoch-0001 in {run / 'checkpoints'}"
        assert re.fullmatch(rf"advmoe: error: {where}; {re.escape(last)}", ended.complaint), ended.complaint
        assert (run / "failed.txt").read_text().startswith("epoch 2: iteration 2 of 3")
        assert drafts(run) == []
        latest = RunFolder(run).latest()
        assert latest is not None
        assert (latest.epoch, latest.partial) == (1, None)
        trained(*own)
        assert_same(run, unbroken(method))


def tiny_model() -> Any:
    from advmoe.config import ModelConfig

    return ModelConfig(width=4)


def test_it_returns_with_a_lower_rate(
    method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    own = words(method, on_nonfinite="restore")
    with tried("NaN, with --on-nonfinite restore", method):
        ended = trained(*own, faults=poisoned("loss", "nan"))
        said = " ".join(ended.said.split())
        assert re.search(
            r"epoch 2: iteration 2 of 3: loss .* is not finite; back to epoch-0001 in .*half the (routers' )?rate \(1 of 3\)",
            said,
        )
        own_rows, wanted = rows(run), rows(unbroken(method))
        assert own_rows[0] == wanted[0]
        assert len(own_rows) == len(wanted)
        lowered = "router_lr" if "router_lr" in wanted[1] else "lr"
        assert own_rows[1][lowered] == pytest.approx(wanted[1][lowered] / 2)
        assert math.isfinite(own_rows[1]["loss"])


def test_it_returns_three_times_at_most(method: str, words: Words, run: Path, tried: Callable[..., Any]) -> None:
    own = words(method, on_nonfinite="restore")
    with tried("NaN that comes back, with --on-nonfinite restore", method):
        ended = advmoe(*own, faults=poisoned("loss", "nan", times=99))
        assert ended.status == 2
        said = " ".join(ended.said.split())
        assert [number for number in "1234" if f"({number} of 3)" in said] == ["1", "2", "3"]
        assert ended.error.strip().splitlines()[-1].startswith("advmoe: error: epoch 2: iteration ")
        latest = RunFolder(run).latest()
        assert latest is not None
        assert latest.epoch == 1


def test_it_returns_to_the_start(words: Words, run: Path) -> None:
    """Before there is a checkpoint."""
    own = words("advmoe", on_nonfinite="restore")
    fault = {"poison": {"place": "loss", "value": "inf", "first": 2, "times": 1}}
    assert "rate (1 of 3)" in " ".join(trained(*own, faults=fault).said.split())
    assert [row["epoch"] for row in rows(run)] == [1, 2]


def test_restores_are_remembered_by_a_resumed_run(words: Words, run: Path) -> None:
    own = words("advmoe", on_nonfinite="restore")
    trained(*own, faults={"poison": {"place": "loss", "value": "nan", "first": 2, "times": 1}})
    latest = RunFolder(run).latest()
    assert latest is not None
    assert latest.restores == 1
