"""Expected times: measured paces times counted work."""

import json

import pytest
import torch

from advmoe.data import load_dataset
from advmoe.profile import picture_spec
from advmoe.sweep.probe import Counts, Pace, Probe, evaluation_seconds, measure, sizes, training_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(("method", "phases"), [("at_dense", 1), ("at_sparse", 2), ("advmoe", 1)])
def test_every_phase_is_timed(tiny, method, phases):
    config = tiny(method)
    pace = measure(config, picture_spec(config), CPU)
    assert len(pace.phases) == phases
    assert min(pace.phases) > 0
    assert pace.step > 0


def test_training_is_what_remains_of_all_phases(tiny):
    pace, counts = Pace((1.0, 10.0), 0.1), Counts(100, 10, 0)
    validation = 10 * 11 * 0.1  # a clean pass and PGD-10
    config = tiny("at_sparse")
    whole = training_seconds(config, counts, pace)
    assert whole == pytest.approx(3 * (100 + validation) + 3 * (1000 + validation))
    assert training_seconds(config, counts, pace, done=2) == pytest.approx(whole - 2 * (100 + validation))
    assert training_seconds(config, counts, pace, done=6) == 0


def test_evaluation_counts_steps_and_routes(tiny):
    pace, counts = Pace((1.0,), 0.1), Counts(100, 10, 40)
    curve = 0.1 * 70 * 40
    assert evaluation_seconds(tiny("at_dense"), counts, pace, ["pgd_10", "reroute"]) == pytest.approx(0.1 * 40 * (10 + 160) + curve)
    routed = evaluation_seconds(tiny("advmoe", num_experts=3), counts, pace, ["pgd_10", "soft_1"])
    assert routed == pytest.approx(0.1 * 40 * (10 + 25 + 50 + 30) + curve)
    quick = evaluation_seconds(tiny("at_moe"), counts, pace, "quick")
    assert quick < evaluation_seconds(tiny("at_moe"), counts, pace, "standard") < evaluation_seconds(tiny(), counts, pace, "full")


def test_one_probe_for_equal_networks_and_none_for_known_ones(tiny, tmp_path):
    told, kept = [], tmp_path / "probe.json"
    probe, config = Probe(CPU, kept, told.append), tiny("at_small_dense")
    spec = picture_spec(config)
    first = probe.pace(config, spec)
    assert probe.pace(tiny("at_small_dense", epochs=9), spec) == first
    assert Probe(CPU, kept, told.append).pace(config, spec) == first
    assert told == ["resnet18 at_small_dense r 0.5"]
    probe.pace(tiny("at_small_dense", model_scale=0.25), spec)
    assert len(told) == len(json.loads(kept.read_text())) == 2


def test_a_broken_file_of_paces_is_made_anew(tiny, tmp_path):
    kept = tmp_path / "probe.json"
    kept.write_text("{")
    config = tiny("at_small_dense")
    Probe(CPU, kept).pace(config, picture_spec(config))
    assert len(json.loads(kept.read_text())) == 1


def test_sizes_are_those_of_the_data(tiny):
    config = tiny().data
    splits = load_dataset(config)
    assert sizes([config, config]) == {config: Counts(len(splits.train), len(splits.val), len(splits.test))}
