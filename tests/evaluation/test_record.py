"""What a Record says, and its RobustBench form."""

import json

import pytest
import torch

from advmoe.evaluation.checks import Check
from advmoe.evaluation.cost import Cost
from advmoe.evaluation.evaluate import Evaluation
from advmoe.evaluation.record import evaluate_run, make_record, model_info
from advmoe.files import write_json
from advmoe.models import build_model
from advmoe.moe import MoEKind


@pytest.fixture
def record(tiny, splits):
    """record(complete, unreliable, epsilon, figures): a Record of an evaluation made up."""

    def make(complete=True, unreliable=False, epsilon=8 / 255, **figures):
        checks = [Check(5, "RA-AA near RA-worst", "fail" if unreliable else "pass", "")]
        evaluation = Evaluation(
            62.5, {"ra_10": 50.0, "ra_50": 37.5, **figures}, 25.0, complete, {}, None, checks, list(range(8)),
            [0, 1, 2, 3, 4], {"pgd_10": [0], "pgd_50": [0, 1], "reroute": [2]}, {},
        )  # fmt: skip
        cost = Cost(100, 0.25, 0.3)
        return make_record(
            tiny(data_dir="somewhere"), splits, evaluation, epoch=2, network=cost, dense=Cost(400, 1.0, 1.0), train_seconds=1.0,
            evaluate_seconds=2.0, attack_seed=7, epsilon=epsilon, norm="Linf",
        )  # fmt: skip

    return make


def test_worst_case_has_its_full_name_only_where_everything_was_run(record):
    assert record(ra_aa=30.0)["ra_worst"] == 25.0
    assert "ra_worst_quick" not in record(ra_aa=30.0)
    quick = record(complete=False)
    assert quick["ra_worst_quick"] == quick["evaluation"]["ra_worst_quick"] == 25.0
    assert "ra_worst" not in quick
    assert "ra_worst" not in quick["evaluation"]


def test_figures_by_steps_flags_and_what_made_it(record):
    found = record(ra_aa=30.0, ra_50x10=1.0)
    assert found["ra"] == {"10": 50.0, "50": 37.5}
    assert found["ra_aa"] == 30.0
    assert found["evaluation"]["flags"] == "00011000"
    assert (found["attack_seed"], found["norm"], found["epsilon"]) == (7, "Linf", 8 / 255)
    assert found["reduction"] == pytest.approx(75)
    assert {"commit", "versions", "hardware", "time", "config", "fingerprint"} <= set(found)
    assert json.loads(json.dumps(found))["evaluation"]["intervals"]["sa"] == pytest.approx([30.57, 86.32], abs=0.01)


def test_robustbench_fields(record):
    info = model_info(record(ra_aa=31.415))
    assert info["eps"] == "8/255"
    assert (info["clean_acc"], info["reported"], info["autoattack_acc"], info["external"]) == ("62.50", "31.41", "31.41", "25.00")
    assert info["unreliable"] is False
    assert set(info) == {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
        "clean_acc", "reported", "autoattack_acc", "external", "unreliable",
    }  # fmt: skip
    assert model_info(record(ra_aa=30.0, unreliable=True))["unreliable"] is True


def test_robustbench_claims_nothing_that_was_not_run(record):
    assert not {"autoattack_acc", "reported", "external", "unreliable"} & set(model_info(record(complete=False)))


@pytest.mark.parametrize(("epsilon", "text"), [(4 / 255, "4/255"), (0.1, "0.1"), (0.5, "0.5"), (1.0, "255/255")])
def test_epsilon_as_a_fraction(record, epsilon, text):
    assert model_info(record(epsilon=epsilon))["eps"] == text


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_evaluating_at_another_radius_leaves_the_runs_configuration_alone(tiny, splits):
    config = tiny()
    torch.manual_seed(0)
    model = build_model(config.model, MoEKind(0.5), splits.spec).eval()
    found = evaluate_run(
        model, config, splits, Cost(1, 1.0, 1.0), epoch=1, train_seconds=0.0, epsilon=0.02, preset=("pgd_10",), seed=3
    )
    assert (found["epsilon"], found["config"]["attack"]["epsilon"]) == (0.02, 0.1)
    assert (found["attack_seed"], found["test_pictures"]) == (3, 20)


def test_a_record_says_nothing_of_where_the_data_lay(record):
    assert record()["config"]["data"]["data_dir"] is None
