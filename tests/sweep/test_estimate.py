"""Expected times: measured paces times counted work."""

import json

import pytest
import torch
from small_backbone import SMALL

from advmoe.config import dump_yaml
from advmoe.data import Counts, load_dataset
from advmoe.runs.cost import image_spec
from advmoe.sweep import estimate
from advmoe.sweep.estimate import (
    Pace,
    Probe,
    Timings,
    evaluation_seconds,
    measure,
    same_but_seed,
    sizes,
    timings,
    training_seconds,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("method", "phases"), [("at_dense", 1), ("at_sparse", 2), ("advmoe", 1)])
def test_every_phase_is_timed(tiny, method, phases):
    config = tiny(method)
    pace = measure(config, image_spec(config), CPU)
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
    assert evaluation_seconds(tiny("at_dense"), counts, pace, ["pgd_10", "reroute"]) == pytest.approx(0.1 * 40 * 10 + curve)
    routed = evaluation_seconds(tiny("advmoe", num_experts=3), counts, pace, ["pgd_10", "soft_1"])
    assert routed == pytest.approx(0.1 * 40 * (10 + 25 + 30) + curve)
    rand = evaluation_seconds(tiny("at_dense"), counts, pace, ["autoattack_rand"])
    assert rand == pytest.approx(0.1 * 40 * (100 + 50) + curve)
    quick = evaluation_seconds(tiny("at_moe"), counts, pace, "quick")
    assert quick < evaluation_seconds(tiny("at_moe"), counts, pace, "standard") < evaluation_seconds(tiny(), counts, pace, "full")


@pytest.fixture
def paces(monkeypatch):
    """What the next probes measure, instead of measuring."""
    found = []
    monkeypatch.setattr(estimate, "measure", lambda config, spec, device: found.pop(0))
    return found


def test_a_call_probes_equal_networks_once_and_the_least_of_all_calls_counts(tiny, tmp_path, paces):
    told, kept, config = [], tmp_path / "probe.json", tiny("at_sparse")
    spec = image_spec(config)
    paces += [Pace((2.0, 5.0), 0.1), Pace((1.0, 7.0), 0.3), Pace((1.0,), 1.0)]
    first = Probe(CPU, kept, told.append)
    assert first.pace(config, spec) == first.pace(tiny("at_sparse", epochs=9, seed=3), spec) == Pace((2.0, 5.0), 0.1)
    second = Probe(CPU, kept, told.append)
    assert second.pace(config, spec) == Pace((1.0, 5.0), 0.1)
    assert told == [f"{SMALL} at_sparse r 0.5"] * 2
    second.pace(tiny("at_small_dense"), spec)
    assert sorted(json.loads(kept.read_text()).values(), key=str) == [
        {"phases": [1.0, 5.0], "step": 0.1},
        {"phases": [1.0], "step": 1.0},
    ]


@pytest.mark.parametrize("held", ["{", "[]", '{"KEY": 3}', '{"KEY": {"phases": [-1.0], "step": 0.0}}', '{"KEY": {"phases": []}}'])
def test_a_broken_file_of_paces_is_written_again(tiny, tmp_path, paces, held):
    kept, config = tmp_path / "probe.json", tiny("at_small_dense")
    paces += [Pace((1.0,), 1.0), Pace((2.0,), 2.0)]
    spec = image_spec(config)
    Probe(CPU, kept).pace(config, spec)
    (key,) = json.loads(kept.read_text())
    kept.write_text(held.replace("KEY", key))
    assert Probe(CPU, kept).pace(config, spec) == Pace((2.0,), 2.0)
    assert json.loads(kept.read_text())[key] == {"phases": [2.0], "step": 2.0}


def test_one_slow_iteration_does_not_count(tiny, monkeypatch):
    """The clock stands in for a machine that is busy with something else during all iterations of a phase but one."""
    times = iter([0.0, 9.0, 10.0, 30.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(times))
    clock = estimate._Clock()
    for done in range(1, 5):
        clock.iteration(1, done, 4, {}, 0)
    assert clock.phases == [[9.0, 1.0, 20.0]]


def test_three_iterations_after_the_first_are_timed_in_every_phase(tiny, monkeypatch):
    clocks, real = [], estimate._Clock

    def made():
        clocks.append(real())
        return clocks[-1]

    monkeypatch.setattr(estimate, "_Clock", made)
    monkeypatch.setattr(estimate, "MIN_SECONDS", 0.0)
    config = tiny("at_sparse")
    pace = measure(config, image_spec(config), CPU)
    (clock,) = clocks
    assert [len(seconds) for seconds in clock.phases] == [3, 3]
    assert pace.phases == tuple(min(seconds) / 8 for seconds in clock.phases)


def test_what_earlier_runs_took_stands_instead_of_the_probe(tiny):
    pace, counts = Pace((1.0, 10.0), 0.1), Counts(100, 10, 0)
    seconds = training_seconds(tiny("at_sparse"), counts, pace, 1, Timings({0: 7.0}))
    assert seconds == pytest.approx(2 * 7.0 + 3 * (1000 + 10 * 11 * 0.1))


def test_sizes_are_those_of_the_data(tiny):
    config = tiny().data
    splits = load_dataset(config)
    assert sizes([config, config]) == {config: Counts(len(splits.train), len(splits.val), len(splits.test))}


# Times of earlier runs


def past_run(folder, config, epochs, record=None):
    """A run whose epochs took so many seconds to train, and one to validate."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config))
    rows = [{"epoch": number, "train_seconds": seconds, "validate_seconds": 1.0} for number, seconds in enumerate(epochs, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    return folder


def record(seconds, attacks):
    return {
        "evaluate_seconds": seconds,
        "evaluation": {"attacks": {name: {"seconds": took} for name, took in attacks.items()}, "left_out": {"reroute": "why"}},
    }


def test_epochs_are_reported_by_phase_and_over_seeds(tiny, tmp_path):
    config = tiny("at_sparse")
    folders = [
        past_run(tmp_path / "a", config, [3.0, 3.0, 3.0, 9.0]),
        past_run(tmp_path / "b", config.replace(seed=1), [5.0, 5.0, 5.0]),
        past_run(tmp_path / "c", tiny("advmoe"), [70.0]),
        tmp_path / "not begun",
    ]
    found = timings(folders, ["pgd_10"])
    assert found == {same_but_seed(config): Timings({0: 5.0, 1: 10.0}), same_but_seed(tiny("advmoe")): Timings({0: 71.0})}


def test_evaluations_by_other_attacks_tell_nothing(tiny, tmp_path):
    config, preset = tiny(), ["pgd_10", "reroute"]
    whole = past_run(tmp_path / "a", config, [1.0], record(8.0, {"pgd_10": 5.0}))
    stopped = past_run(tmp_path / "b", config, [1.0], record(2.0, {"pgd_10": 4.0}))
    other = past_run(tmp_path / "c", config, [1.0], record(900.0, {"pgd_10": 5.0, "pgd_50": 800.0}))
    assert timings([whole, stopped, other], preset)[same_but_seed(config)].evaluation == pytest.approx(6.0)
    assert timings([other], preset)[same_but_seed(config)].evaluation is None


def test_what_is_no_record_tells_nothing(tiny, tmp_path):
    folder = past_run(tmp_path / "a", tiny(), [1.0], {"evaluation": 3})
    assert timings([folder], "quick")[same_but_seed(tiny())].evaluation is None


def test_threads_part_runs_and_places_do_not(tiny):
    assert same_but_seed(tiny(threads=1)) != same_but_seed(tiny(threads=2))
    assert same_but_seed(tiny(device="cpu", data_dir="here", epochs=4, seed=2)) == same_but_seed(tiny())
