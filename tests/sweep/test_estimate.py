"""Expected times: measured paces times counted work."""

import json

import pytest
import torch
from records import content
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
from advmoe.training.interrupts import Stopped

CPU = torch.device("cpu")


@pytest.mark.parametrize(("method", "phases"), [("at_dense", 1), ("at_sparse", 2), ("advmoe", 1)])
def test_every_phase_is_timed(tiny, method, phases):
    config = tiny(method)
    pace = measure(config, image_spec(config), CPU)
    assert len(pace.phases) == phases
    assert min(pace.phases) > 0
    assert pace.step > 0


@pytest.mark.parametrize("training", [{"teacher": "not/trained/yet"}, {"init_from": "not/trained/yet"}], ids=str)
def test_a_run_is_timed_before_the_run_that_it_needs_is_trained(tiny, training):
    config = tiny("at_moe", **training)
    assert min(measure(config, image_spec(config), CPU).phases) > 0


@pytest.mark.parametrize("options", [{"router_loss": "target"}, {"router_warmup": 0.3}], ids=str)
def test_a_target_that_needs_several_epochs_is_timed(tiny, options):
    config = tiny("advmoe", epochs=5, tied_share=0.0, router_target="confusion", **options)
    assert min(measure(config, image_spec(config), CPU).phases) > 0


def test_a_rate_at_which_random_images_would_diverge_does_not_stop_the_estimate(tiny):
    config = tiny("advmoe", lr=1e30, router_lr=1e30)
    assert min(measure(config, image_spec(config), CPU).phases) > 0


def test_a_stop_while_the_speed_is_measured_does_not_speak_of_a_checkpoint(tiny, monkeypatch):
    def stopped(*arguments):
        raise Stopped(15, "after epoch 1, which is saved")

    monkeypatch.setattr("advmoe.sweep.estimate.train", stopped)
    config = tiny("at_dense")
    with pytest.raises(Stopped, match=r"^while the speed was measured, before any run was continued$"):
        measure(config, image_spec(config), CPU)


def test_training_time_is_that_of_the_remaining_epochs(tiny):
    pace, counts = Pace((1.0, 10.0), 0.1), Counts(100, 10, 0)
    validation = 10 * 11 * 0.1  # a clean pass and PGD-10
    config = tiny("at_sparse")
    total = training_seconds(config, counts, pace)
    assert total == pytest.approx(3 * (100 + validation) + 3 * (1000 + validation))
    assert training_seconds(config, counts, pace, done=2) == pytest.approx(total - 2 * (100 + validation))
    assert training_seconds(config, counts, pace, done=6) == 0


def test_evaluation_counts_steps_and_routes(tiny):
    pace, counts = Pace((1.0,), 0.1), Counts(100, 10, 40)
    curve = 0.1 * 70 * 40
    assert evaluation_seconds(tiny("at_dense"), counts, pace, ["pgd_10", "reroute"]) == pytest.approx(0.1 * 40 * 10 + curve)
    routed = evaluation_seconds(tiny("advmoe", num_experts=3), counts, pace, ["pgd_50", "soft_1"])
    assert routed == pytest.approx(0.1 * 40 * (50 + 34 + 3 * (10 + 39.5)) + curve)
    rand = evaluation_seconds(tiny("at_dense"), counts, pace, ["autoattack_rand"])
    assert rand == pytest.approx(0.1 * 40 * (2100 + 1050) + curve)  # 20 gradients a step, for noise
    quick = evaluation_seconds(tiny("at_moe"), counts, pace, "quick")
    assert quick < evaluation_seconds(tiny("at_moe"), counts, pace, "standard") < evaluation_seconds(tiny(), counts, pace, "full")


@pytest.fixture
def paces(monkeypatch):
    """A list of paces that the next probes return instead of measuring."""
    remaining = []
    monkeypatch.setattr(estimate, "measure", lambda config, spec, device: remaining.pop(0))
    return remaining


def test_equal_networks_are_probed_once_and_the_fastest_probe_counts(tiny, tmp_path, paces):
    messages, probe_file, config = [], tmp_path / "probe.json", tiny("at_sparse")
    spec = image_spec(config)
    paces += [Pace((2.0, 5.0), 0.1), Pace((1.0, 7.0), 0.3), Pace((1.0,), 1.0)]
    first = Probe(CPU, probe_file, messages.append)
    assert first.pace(config, spec) == first.pace(tiny("at_sparse", epochs=9, seed=3), spec) == Pace((2.0, 5.0), 0.1)
    second = Probe(CPU, probe_file, messages.append)
    assert second.pace(config, spec) == Pace((1.0, 5.0), 0.1)
    assert messages == [f"{SMALL} at_sparse r 0.5"] * 2
    second.pace(tiny("at_small_dense"), spec)
    assert sorted(json.loads(probe_file.read_text()).values(), key=str) == [
        {"phases": [1.0, 5.0], "step": 0.1},
        {"phases": [1.0], "step": 1.0},
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"KEY": 3}', '{"KEY": {"phases": [-1.0], "step": 0.0}}', '{"KEY": {"phases": []}}'])
def test_a_damaged_file_of_paces_is_replaced(tiny, tmp_path, paces, text):
    probe_file, config = tmp_path / "probe.json", tiny("at_small_dense")
    paces += [Pace((1.0,), 1.0), Pace((2.0,), 2.0)]
    spec = image_spec(config)
    Probe(CPU, probe_file).pace(config, spec)
    (key,) = json.loads(probe_file.read_text())
    probe_file.write_text(text.replace("KEY", key))
    assert Probe(CPU, probe_file).pace(config, spec) == Pace((2.0,), 2.0)
    assert json.loads(probe_file.read_text())[key] == {"phases": [2.0], "step": 2.0}


def test_one_slow_iteration_does_not_count(tiny, monkeypatch):
    """The clock of a machine that is busy during all iterations of a phase except one."""
    times = iter([0.0, 9.0, 10.0, 30.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(times))
    clock = estimate._Clock()
    for done in range(1, 5):
        clock.iteration(1, done, 4, {}, 0)
    assert clock.phases == [[9.0, 1.0, 20.0]]


def test_three_iterations_after_the_first_are_timed_in_every_phase(tiny, monkeypatch):
    clocks, real = [], estimate._Clock

    def recorded_clock():
        clocks.append(real())
        return clocks[-1]

    monkeypatch.setattr(estimate, "_Clock", recorded_clock)
    monkeypatch.setattr(estimate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(estimate, "MAX_BATCH", 8)
    config = tiny("at_sparse")
    pace = measure(config, image_spec(config), CPU)
    (clock,) = clocks
    assert [len(seconds) for seconds in clock.phases] == [3, 3]
    assert pace.phases == tuple(min(seconds) / 8 for seconds in clock.phases)


def test_times_of_earlier_runs_replace_the_probe(tiny):
    pace, counts = Pace((1.0, 10.0), 0.1), Counts(100, 10, 0)
    seconds = training_seconds(tiny("at_sparse"), counts, pace, 1, Timings({0: 7.0}))
    assert seconds == pytest.approx(2 * 7.0 + 3 * (1000 + 10 * 11 * 0.1))


def test_sizes_are_those_of_the_data(tiny):
    config = tiny().data
    splits = load_dataset(config)
    assert sizes([config, config]) == {config: Counts(len(splits.train), len(splits.val), len(splits.test))}


# Times of earlier runs


def past_run(folder, config, epochs, record=None):
    """A run whose epochs took `epochs` seconds to train, and one second each to validate."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config))
    rows = [{"epoch": number, "train_seconds": seconds, "validate_seconds": 1.0} for number, seconds in enumerate(epochs, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    return folder


def record(seconds, attacks):
    totals = {name: {"attacked": 1, "broken": 0, "seconds": took} for name, took in attacks.items()}
    evaluation = {**content()["evaluation"], "attacks": totals, "left_out": {"reroute": "why"}}
    return content(evaluate_seconds=seconds, evaluation=evaluation)


def test_epochs_are_reported_by_phase_and_over_seeds(tiny, tmp_path):
    config = tiny("at_sparse")
    folders = [
        past_run(tmp_path / "a", config, [3.0, 3.0, 3.0, 9.0]),
        past_run(tmp_path / "b", config.replace(seed=1), [5.0, 5.0, 5.0]),
        past_run(tmp_path / "c", tiny("advmoe"), [70.0]),
        tmp_path / "not begun",
    ]
    measured = timings(folders, ["pgd_10"])
    assert measured == {same_but_seed(config): Timings({0: 5.0, 1: 10.0}), same_but_seed(tiny("advmoe")): Timings({0: 71.0})}


def test_evaluations_with_other_attacks_are_ignored(tiny, tmp_path):
    config, preset = tiny(), ["pgd_10", "reroute"]
    complete = past_run(tmp_path / "a", config, [1.0], record(8.0, {"pgd_10": 5.0}))
    stopped = past_run(tmp_path / "b", config, [1.0], record(2.0, {"pgd_10": 4.0}))
    other = past_run(tmp_path / "c", config, [1.0], record(900.0, {"pgd_10": 5.0, "pgd_50": 800.0}))
    assert timings([complete, stopped, other], preset)[same_but_seed(config)].evaluation == pytest.approx(6.0)
    assert timings([other], preset)[same_but_seed(config)].evaluation is None


def test_a_damaged_record_is_ignored(tiny, tmp_path):
    folder = past_run(tmp_path / "a", tiny(), [1.0], {"evaluation": 3})
    assert timings([folder], "quick")[same_but_seed(tiny())].evaluation is None


def test_runs_differ_by_the_compiler_but_not_by_the_time_between_checkpoints(tiny):
    assert same_but_seed(tiny(compile="inductor")) != same_but_seed(tiny())
    assert same_but_seed(tiny(save_minutes=1.0)) == same_but_seed(tiny())


def test_runs_differ_by_threads_and_kind_of_device_but_not_by_its_number_or_folder(tiny, monkeypatch):
    assert same_but_seed(tiny(threads=1)) != same_but_seed(tiny(threads=2))
    assert same_but_seed(tiny(device="cuda:1", data_dir="data", epochs=4, seed=2)) == same_but_seed(tiny(device="cuda"))
    assert same_but_seed(tiny(device="cuda")) != same_but_seed(tiny(device="cpu"))
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert same_but_seed(tiny(device="auto")) == same_but_seed(tiny(device=device))
