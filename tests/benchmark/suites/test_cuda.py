"""The parts of the CUDA suite that run on the CPU."""

from dataclasses import replace

import pytest
import torch

from advmoe.benchmark.process import ProcessFailed
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Scale, Setup
from advmoe.benchmark.suites import cuda
from advmoe.benchmark.suites.cuda import networks
from advmoe.benchmark.suites.cuda.common import Figure, Part, guarded
from advmoe.benchmark.suites.cuda.iterations import variants
from advmoe.benchmark.suites.cuda.layers import layer_shapes
from advmoe.moe import DISPATCHES

PART = Part(torch.device("cpu"), True, without=("grouped", "triton"))
SETUP = Setup(quick=True)


@pytest.fixture
def small(small_networks, monkeypatch):
    """Small networks, and torch.compile does nothing (tests/training/test_compiled.py compiles)."""
    networks.network_once.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    yield
    networks.network_once.cache_clear()


@pytest.mark.parametrize("name", list(cuda.SECTIONS))
@pytest.mark.usefixtures("small")
def test_every_section_runs_for_every_dispatch(name):
    rows = list(cuda.SECTIONS[name](PART))
    assert [row for row in rows if row.failed] == []
    names = " ".join(row.name for row in rows)
    assert "split" in names
    assert "wide" in names


def test_the_dense_layers_are_those_of_the_dense_networks():
    """The first MoE layer reads the stem, which has the channels of the dense network."""
    first, second, *_ = layer_shapes(PART)
    assert (first.channels, first.width, first.of_dense) == (8, 4, ((8, 8), (4, 4)))
    assert (second.channels, second.width, second.of_dense) == (4, 4, ((8, 8), (4, 4)))
    downsampling = next(shape for shape in layer_shapes(PART) if shape.stride == 2)
    assert (downsampling.channels, downsampling.width, downsampling.of_dense) == (4, 8, ((8, 16), (4, 8)))


def test_sections_run_in_processes_and_the_verdict_follows(monkeypatch):
    monkeypatch.setattr(cuda, "SECTIONS", {"equality": cuda.equality})
    rows = list(cuda.measure(SETUP))
    assert {row.case for row in rows[:-2]} >= {"equality, split, float32", "equality, wide, float32"}
    assert [(row.what, row.value, row.met) for row in rows[-2:]] == [("failed rows", 0, True), ("wrong dispatches", 0, True)]


def test_equality_detects_a_wrong_dispatch(monkeypatch):
    wide = DISPATCHES["wide"]
    monkeypatch.setitem(DISPATCHES, "wide", lambda *args: 1.001 * wide(*args))
    rows = list(cuda.equality(PART))
    assert [row.case for row in rows if row.failed] == ["equality, wide, float32"]
    assert "differs from the loop" in next(row.failed for row in rows if row.failed)
    with_grouped = replace(PART, without=("triton",))  # without rows for it
    assert cuda.unsound(rows, with_grouped) == ["wide", "grouped"]


def test_a_dispatch_passes_only_in_every_data_type():
    """If the process ended in the second one, nothing is known about it."""
    part = replace(PART, device=torch.device("cuda"), without=("wide", "grouped", "triton"))
    rows = [
        Row(suite="cuda", case=f"equality, split, {dtype}", what="relative error of y", value=0.0)
        for dtype in ("float32", "bfloat16")
    ]
    assert cuda.unsound(rows[:1], part) == ["split"]
    assert cuda.unsound(rows, part) == []


def test_rounds_reach_the_sections(monkeypatch):
    tasks = []
    monkeypatch.setattr(cuda, "run_in_process", lambda function, task, *_: iter(tasks.append(task) or ()))
    monkeypatch.setattr(cuda, "SECTIONS", {"waits": None})
    list(cuda.measure(Setup(scale=Scale(rounds=3))))
    part = Part.of(tasks[0])
    assert (part.rounds(30), replace(part, chosen_rounds=None).rounds(30), replace(part, quick=True).rounds(30)) == (3, 30, 1)


def test_a_wrong_dispatch_is_not_timed_and_a_crash_is_a_row(monkeypatch):
    tasks = []

    def run_in_process(function, task, result, seconds):
        tasks.append((task.section, task.without))
        if task.section == "equality":
            yield Row(suite="cuda", case="equality, split, float32", what="relative error of y", value=0.0, unit="%")
            raise ProcessFailed("the process ended with status -11")
        yield Row(suite="cuda", case="iterations, AdvMoE split", what=cuda.HUNDRED_EPOCHS, value=12.0, unit="min")

    monkeypatch.setattr(cuda, "run_in_process", run_in_process)
    monkeypatch.setattr(cuda, "SECTIONS", {"equality": None, "iterations": None})
    rows = list(cuda.measure(SETUP))
    assert tasks[0] == ("equality", ())
    assert tasks[1][0] == "iterations"
    assert {"wide", "grouped"} <= set(tasks[1][1])
    assert "split" not in tasks[1][1]
    assert [row.failed for row in rows if row.failed] == ["ProcessFailed: the process ended with status -11"]
    assert (rows[-1].what, rows[-1].value, rows[-1].met) == ("100 epochs of CIFAR-10, AdvMoE split", 12.0, False)


@pytest.mark.usefixtures("small")
def test_an_epoch_has_390_iterations():
    rows = {row.what: row for row in cuda.iterations(PART) if row.case == "iterations, AT (Dense)"}
    time = rows["time"]
    assert rows["100 epochs of CIFAR-10"].value == pytest.approx(time.value * 39000 / 60)
    assert time.spread[0] <= time.value <= time.spread[1]


def test_iterations_as_cuda_graphs_are_timed_for_static_shapes(monkeypatch):
    assert {mode for _, _, mode in variants(PART)} == {"none"}
    monkeypatch.setattr(Part, "cuda", True)
    assert [dispatch for _, dispatch, mode in variants(PART) if mode == "graphs"] == ["wide"]


def test_an_error_is_a_row():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    (row,) = guarded("waits", "triton", broken)
    assert (row.case, row.value, row.failed) == ("waits, triton", None, "RuntimeError: no such kernel and more")
    (row,) = guarded("waits", "split", lambda: {"time": Figure(2.0, "ms")})
    assert (row.what, row.value, row.unit, row.failed) == ("time", 2.0, "ms", None)
