import pytest
import torch

from advmoe.benchmark import growth
from advmoe.benchmark.growth import AXES, Task, draw, exponent, found
from advmoe.benchmark.memory import Probe
from advmoe.benchmark.variants import Scale, configuration

CPU = torch.device("cpu")
TASK = Task(configuration("AdvMoE", Scale()), 32)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_power_laws_are_found(power):
    assert exponent({value: 7 * value**power for value in (1, 3, 8, 20)}) == pytest.approx(power, abs=1e-9)


def test_spread_is_that_of_neighbouring_values():
    one = found("batch", "seconds", {4: 16.0, 1: 1.0, 2: 2.0})  # slopes 1 and 3
    (row,) = one.rows
    assert (row.name, row.suite, row.target, row.met) == ("iteration's time against batch: exponent", "growth", None, None)
    assert row.ratio == pytest.approx(2)
    assert row.spread == pytest.approx((1, 3))
    assert one.measured == {"1": [1.0], "2": [2.0], "4": [16.0]}


def test_axes_change_what_they_say():
    changed = {name: change(TASK, values[-1]) for name, (change, values) in AXES.items()}
    assert changed["batch"].run.training.batch_size == 128
    assert (changed["experts N"].run.model.num_experts, changed["experts N"].run.model.bank) == (16, "disjoint")
    assert changed["model scale r"].run.model.model_scale == 1.0
    assert changed["image side"] == Task(TASK.run, 64)
    assert changed["attack steps"].run.attack.num_steps == 10


def test_suite_fits_every_axis_and_its_figure_is_drawn(monkeypatch, tmp_path):
    def model(run, side, device, iterations):
        assert iterations == 3
        size = run.training.batch_size * side**2 * run.model.model_scale
        return Probe(round(1e6 * size), 1e-6 * size * run.attack.num_steps * run.model.num_experts**0.25)

    monkeypatch.setattr(growth, "probe", model)
    monkeypatch.setattr(growth, "measurable", lambda device: True)
    founds = list(growth.growth(Scale(rounds=2), CPU))
    times = {one.title.rpartition(" against ")[2]: one.rows[0].ratio for one in founds if one.unit == "seconds"}
    expected = {"batch": 1.0, "experts N": 0.25, "model scale r": 1.0, "image side": 2.0, "attack steps": 1.0}
    assert times == pytest.approx(expected)
    assert sum(one.unit == "bytes" for one in founds) == len(AXES)
    draw(founds, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_without_memory_there_are_times_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "probe", lambda run, side, *_: Probe(0, 1e-3 * side))
    monkeypatch.setattr(growth, "measurable", lambda device: False)
    founds = list(growth.growth(Scale(), CPU))
    assert [one.unit for one in founds] == ["seconds"] * len(AXES)
    draw(founds, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0
