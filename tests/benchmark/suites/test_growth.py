import pytest

from advmoe.benchmark.memory import Probe
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Scale, Setup
from advmoe.benchmark.suites import growth
from advmoe.benchmark.suites.growth import AXES, Task, draw, exponent, fitted
from advmoe.benchmark.variants import configuration

TASK = Task(configuration("AdvMoE", Scale()), 32)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_power_laws_are_found(power):
    assert exponent({value: 7 * value**power for value in (1, 3, 8, 20)}) == pytest.approx(power, abs=1e-9)


def test_the_spread_is_over_neighbouring_values():
    *points, row = fitted("batch", "s", {4: 16.0, 1: 1.0, 2: 2.0})  # slopes 1 and 3
    assert [(point.what, point.value, point.unit) for point in points] == [("1", 1.0, "s"), ("2", 2.0, "s"), ("4", 16.0, "s")]
    assert (row.name, row.suite, row.target, row.unit) == ("iteration's time against batch: exponent", "growth", None, "exponent")
    assert row.value == pytest.approx(2)
    assert row.spread == pytest.approx((1, 3))


def test_every_axis_changes_its_setting():
    tasks = {name: change(TASK, values[-1]) for name, (change, values) in AXES.items()}
    assert tasks["batch"].run.training.batch_size == 512
    assert (tasks["experts N"].run.model.num_experts, tasks["experts N"].run.model.bank) == (64, "disjoint")
    assert tasks["model scale r"].run.model.model_scale == 1.0
    assert tasks["image side"] == Task(TASK.run, 64)
    assert tasks["attack steps"].run.attack.num_steps == 10


def test_the_suite_fits_every_axis_and_draws_its_figure(monkeypatch, tmp_path):
    def model(run, side, device, iterations):
        assert iterations == 3
        size = run.training.batch_size * side**2 * run.model.model_scale
        seconds = 1e-6 * size * run.attack.num_steps * run.model.num_experts**0.25
        return Probe(memory=round(1e6 * size), seconds=seconds)

    monkeypatch.setattr(growth, "probe", model)
    monkeypatch.setattr(growth, "measurable", lambda device: True)
    rows = list(growth.measure(Setup(scale=Scale(rounds=2))))
    exponents = [row for row in rows if row.unit == "exponent"]
    times = {row.case.rpartition(" against ")[2]: row.value for row in exponents if "time" in row.case}
    assert times == pytest.approx({"batch": 1.0, "experts N": 0.25, "model scale r": 1.0, "image side": 2.0, "attack steps": 1.0})
    assert len(exponents) == 2 * len(AXES)
    other = Row(suite="data", case="iteration's time against nothing", what="7", value=1.0, unit="s")
    draw([other, *rows], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_without_memory_there_are_only_times(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "probe", lambda run, side, *_: Probe(memory=0, seconds=1e-3 * side))
    monkeypatch.setattr(growth, "measurable", lambda device: False)
    rows = list(growth.measure(Setup()))
    assert {row.unit for row in rows} == {"s", "exponent"}
    draw(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0
