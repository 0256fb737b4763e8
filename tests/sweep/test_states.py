"""A run's state from its folder alone."""

import json
import os

import pytest

from advmoe.config import dump_yaml
from advmoe.sweep.states import FAILED, LOG, State, mark_failed, state_of


@pytest.fixture
def folder(tiny, tmp_path):
    """folder(method): that of a run of 3 epochs a phase which has only been claimed."""

    def make(method="advmoe"):
        (tmp_path / "config.yaml").write_text(dump_yaml(tiny(method)))
        return tmp_path

    return make


def trained(run, epochs):
    (run / "metrics.jsonl").write_text('{"epoch": 0}\n' * epochs)


def evaluated(run, attacks, left_out=()):
    evaluation = {"attacks": {name: {} for name in attacks}, "left_out": dict.fromkeys(left_out, "why")}
    (run / "record.json").write_text(json.dumps({"evaluation": evaluation}))


def test_no_folder_is_planned(tmp_path):
    assert state_of(tmp_path / "none") == State("planned")


def test_from_planned_to_done(folder):
    run = folder()
    assert state_of(run) == State("planned", 0, 3)
    (run / LOG).touch()
    assert str(state_of(run)) == "training epoch 1 of 3"
    trained(run, 2)
    assert str(state_of(run)) == "training epoch 3 of 3"
    trained(run, 3)
    assert state_of(run) == State("evaluating", 3, 3)
    evaluated(run, ["pgd_10"])
    assert state_of(run) == State("done", 3, 3)


def test_epochs_of_all_phases_count(folder):
    run = folder("at_sparse")
    trained(run, 3)
    assert str(state_of(run)) == "training epoch 4 of 6"


def test_failed_keeps_its_line_and_its_epochs(folder):
    run = folder()
    trained(run, 1)
    mark_failed(run, "epoch 2: loss is not finite")
    assert str(state_of(run)) == "failed: epoch 2: loss is not finite"
    assert state_of(run).epoch == 1
    (run / FAILED).unlink()
    assert state_of(run).kind == "training"


def test_done_is_what_all_asked_attacks_were_run_on(folder):
    run = folder()
    trained(run, 3)
    evaluated(run, ["pgd_10", "pgd_20"], left_out=["reroute_quick"])
    assert state_of(run, ("pgd_10", "reroute_quick")).kind == "done"
    assert state_of(run, ("pgd_10", "pgd_50")).kind == "evaluating"
    assert state_of(run, "quick").kind == "evaluating"
    evaluated(run, ["pgd_10", "pgd_20", "pgd_50", "straight_through_1", "reroute_quick", "held_route"])
    os.utime(run / "record.json", ns=(1, 1))  # a clock too coarse for two writes in a row
    assert state_of(run, "quick").kind == "done"


@pytest.mark.parametrize("text", ['{"evaluation": {"att', "[]", "null", '{"evaluation": 3}'])
def test_half_a_record_is_none(folder, text):
    run = folder()
    trained(run, 3)
    (run / "record.json").write_text(text)
    assert state_of(run, "quick").kind == "evaluating"
    assert state_of(run).kind == "evaluating"
