"""The status of a run, read from its folder."""

import json
import os

import pytest
from records import changed, content

from advmoe.attacks import autoattack
from advmoe.attacks.registry import ATTACKS
from advmoe.config import dump_yaml
from advmoe.runs.failure import FAILED, mark_failed
from advmoe.runs.status import LOG, State, read_run

QUICK = ["pgd_10", "pgd_20", "pgd_50", "straight_through_1", "reroute_quick", "held_route"]


@pytest.fixture
def folder(tiny, tmp_path):
    """folder(method): the folder of a run of 3 epochs a phase that has not started."""

    def make(method="advmoe"):
        (tmp_path / "config.yaml").write_text(dump_yaml(tiny(method, epsilon=8 / 255, limit_test=100)))
        return tmp_path

    return make


def trained(run, epochs):
    lines = [json.dumps({"epoch": epoch, "train_seconds": 2.0, "validate_seconds": 1.0}) for epoch in range(1, epochs + 1)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def evaluated(run, attacks, left_out=(), limit_test=100, **fields):
    """Write a Record with these attacks, each of a version or the present one."""
    record = changed("data", limit_test=limit_test) | {"epsilon": 8 / 255, "evaluate_seconds": 0.0} | fields
    versions = attacks if isinstance(attacks, dict) else {name: ATTACKS[name].version for name in attacks}
    results = {name: {"attacked": 1, "broken": 0, "seconds": 2.0, "version": version} for name, version in versions.items()}
    record["evaluation"] |= {"attacks": results, "left_out": dict.fromkeys(left_out, "why")}
    (run / "record.json").write_text(json.dumps(record))
    for number, file in enumerate(sorted(run.rglob("*"))):
        os.utime(file, ns=(number, number))  # so that no two files have the same time


def test_no_folder_is_planned(tmp_path):
    assert read_run(tmp_path / "none").state is State.PLANNED


def test_the_states_of_a_run_from_start_to_end(folder):
    run = folder()
    (run / LOG).touch()
    assert read_run(run).describe() == "training epoch 1 of 3"
    trained(run, 2)
    assert read_run(run).describe() == "training epoch 3 of 3"
    trained(run, 3)
    assert (read_run(run).state, read_run(run).epoch, read_run(run).epochs) == (State.TRAINED, 3, 3)
    evaluated(run, ["pgd_10"])
    assert read_run(run).state is State.DONE


def test_epochs_of_all_phases_count(folder):
    run = folder("at_sparse")
    trained(run, 4)
    assert read_run(run).describe() == "training epoch 5 of 6"
    assert read_run(run).phase_seconds() == {0: [3.0, 3.0, 3.0], 1: [3.0]}


def test_the_state_of_a_run_does_not_need_the_code_of_its_method(folder):
    run = folder()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("method: advmoe", "method: mine"))
    assert read_run(run).describe() == "training epoch 1 of 3"
    trained(run, 3)
    assert (read_run(run).state, read_run(run).epochs, read_run(run).reason) == (State.TRAINED, 3, "")
    trained(run, 4)
    assert read_run(run).describe() == "training epoch 5 of 6"  # it has a second phase
    trained(run, 6)
    evaluated(run, ["pgd_10"])
    assert (read_run(run).state, read_run(run).config.method) == (State.DONE, "mine")
    mark_failed(run, "loss is not finite")
    assert read_run(run).describe() == "failed: loss is not finite"


def test_a_failed_run_has_its_error_and_its_epochs(folder):
    run = folder()
    trained(run, 1)
    mark_failed(run, "epoch 2: loss is not finite")
    assert read_run(run).describe() == "failed: epoch 2: loss is not finite"
    assert read_run(run).epoch == 1
    (run / FAILED).unlink()
    assert read_run(run).state is State.TRAINING


def test_a_run_is_done_when_all_wanted_attacks_were_run(folder):
    run = folder()
    trained(run, 3)
    evaluated(run, ["pgd_10", "pgd_20"], left_out=["reroute_quick"])
    assert read_run(run, ("pgd_10", "reroute_quick")).state is State.DONE
    assert read_run(run, ("pgd_10", "pgd_50")).state is State.TRAINED
    assert read_run(run, QUICK).state is State.TRAINED
    evaluated(run, QUICK)
    os.utime(run / "record.json")
    assert read_run(run, QUICK).state is State.DONE
    assert read_run(run).evaluation_seconds(QUICK) == 12.0
    assert read_run(run).evaluation_seconds(["pgd_10"]) is None
    evaluated(run, ["aa_apgd-ce", "apgd_t", "aa_fab-t", "aa_square"], left_out=["aa_apgd-t"])  # a network with three classes
    os.utime(run / "record.json")
    assert read_run(run, autoattack.STANDARD).state is State.DONE
    assert read_run(run).evaluation_seconds(autoattack.STANDARD) == 8.0


def test_results_that_are_newer_than_the_record_do_not_make_it_missing(folder):
    """A copied run has files of the time of the copy, and another evaluation may be running."""
    run = folder()
    trained(run, 3)
    (run / "evaluation").mkdir()
    (run / "evaluation/shard-00000.json").write_text("{}")
    evaluated(run, QUICK)
    assert (read_run(run, QUICK).state, read_run(run, QUICK).is_evaluated) == (State.DONE, True)
    os.utime(run / "evaluation/shard-00000.json")
    assert (read_run(run, QUICK).state, read_run(run, QUICK).is_evaluated) == (State.EVALUATING, True)
    assert not read_run(run, [*QUICK, "paths"]).is_evaluated
    mark_failed(run, "out of memory")
    assert not read_run(run, QUICK).is_evaluated


def test_an_attack_of_an_older_version_was_not_run(folder):
    run = folder()
    trained(run, 3)
    evaluated(run, {"pgd_10": 1, "reroute": 2, "mine": 1})
    assert read_run(run, ["pgd_10", "reroute", "mine"]).is_evaluated
    evaluated(run, {"pgd_10": 1, "reroute": 1, "mine": 1})
    os.utime(run / "record.json")
    assert not read_run(run, ["reroute"]).is_evaluated
    assert read_run(run, ["pgd_10", "mine"]).is_evaluated


@pytest.mark.parametrize("fields", [{"epsilon": 4 / 255}, {"norm": "L2"}, {"attack_seed": 1}, {"limit_test": 7}])
def test_a_record_of_another_threat_is_not_the_wanted_one(folder, fields):
    run = folder()
    trained(run, 3)
    evaluated(run, QUICK, **fields)
    assert read_run(run, QUICK).state is State.TRAINED
    assert read_run(run).state is State.DONE


def test_a_record_from_before_the_end_of_the_training_does_not_count(folder):
    run = folder()
    trained(run, 3)
    for epochs, state in ((1, State.TRAINED), (3, State.DONE)):
        evaluated(run, QUICK, history=content()["history"][:epochs])
        assert [read_run(run, attacks).state for attacks in (QUICK, None)] == [state, state]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"evaluation": {"att', "is not JSON"),
        ("[]", "holds no Record"),
        ("{}", "holds no Record"),
        (json.dumps(content(gmacs="x")), "holds no Record (gmacs is 'x', not a number above 0)"),
        (json.dumps(content(sa=-5)), "holds no Record (sa is -5, not a number from 0 to 100)"),
        (json.dumps(content() | {"method": None}), "holds no Record (method is None"),
        (json.dumps(content(config=3)), "holds no Record (config is 3, not an object)"),
        (json.dumps(content(schema=99)), "holds a Record of schema 99; this advmoe reads 1 to 3: a newer one is needed"),
    ],
)
def test_a_run_whose_record_cannot_be_read_has_failed(folder, text, reason):
    run = folder()
    trained(run, 3)
    (run / "record.json").write_text(text)
    for attacks in (None, QUICK):
        status = read_run(run, attacks)
        assert (status.state, status.is_evaluated, status.record) == (State.FAILED, False, None)
        assert status.reason.startswith(f"{run}/record.json: {reason}")


def test_progress_grows_with_every_checkpoint_epoch_and_attack(folder):
    run = folder()
    steps = [read_run(run).progress]
    for name in ("epoch-0000-000005", "epoch-0001", "epoch-0001-000002"):
        (run / "checkpoints" / name).mkdir(parents=True)
        steps.append(read_run(run).progress)
    trained(run, 3)
    steps.append(read_run(run).progress)
    (run / "evaluation").mkdir()
    for attacks in ({}, {"pgd_10": {}}, {"pgd_10": {}, "pgd_20": {}}):
        (run / "evaluation/shard-00000.json").write_text(json.dumps({"attacks": attacks}))
        steps.append(read_run(run).progress)
    (run / "evaluation/shard-00001.json").write_text('{"attacks": {"pgd_1')
    steps.append(read_run(run).progress)
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps) - 2  # an empty shard and a damaged one do not count


# Folders that cannot be read


def test_a_folder_that_cannot_be_read_is_a_failed_run(tmp_path):
    status = read_run(tmp_path / ("x" * 300))  # unlike permissions, this holds for root too
    assert (status.state, status.reason.rpartition(": ")[2]) == (State.FAILED, "File name too long")
