"""benchmarks/gpu.py where there is no GPU: all of it that the CPU can run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    described = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(described)
    sys.modules["gpu_benchmark"] = module  # where dataclasses look their annotations up
    described.loader.exec_module(module)
    return module


@pytest.fixture
def setup(gpu):
    return gpu.Setup(torch.device("cpu"), True, without=("grouped", "triton"))


def called(gpu, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    return gpu.main()


@pytest.mark.parametrize("name", ["equality", "waits", "iterations", "inference", "layers", "compiled"])
def test_every_section_runs_for_every_dispatch(gpu, setup, name):
    rows = list(gpu.SECTIONS[name](setup))
    assert [row for row in rows if "failed" in row] == []
    named = json.dumps(rows)
    assert "split" in named
    assert "wide" in named
    assert all(gpu.shown(row) for row in rows)


def test_the_call_writes_what_its_processes_found(gpu, monkeypatch, tmp_path, capfd):
    words = ("--device", "cpu", "--quick", "--sections", "equality", "--out", str(tmp_path / "gpu.json"))
    assert called(gpu, monkeypatch, *words) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in found["sections"]["equality"]][:2] == ["split, float32", "wide, float32"]
    assert found["machine"]["torch"] == torch.__version__
    assert "0 failed" in capfd.readouterr().out


def test_equality_sees_a_wrong_dispatch(gpu, setup, monkeypatch):
    right = gpu.DISPATCHES["wide"]
    monkeypatch.setitem(gpu.DISPATCHES, "wide", lambda *given: 1.001 * right(*given))
    good, bad = gpu.equality(setup)
    assert "failed" not in good
    assert "differs from the loop" in bad["failed"]
    assert gpu.unsound([good, bad], ["split", "wide", "triton"]) == ["wide", "triton"]


def test_a_minute_is_390_iterations_an_epoch(gpu, setup):
    row = next(iter(gpu.iterations(setup)))
    assert row["minutes_100_epochs"] == pytest.approx(row["ms"] / 1000 * 39000 / 60)
    assert row["least_ms"] <= row["ms"] <= row["most_ms"]


def test_what_fails_is_a_row(gpu):
    def broken():
        raise RuntimeError("no such kernel\nand more")

    assert gpu.guarded("triton", broken) == {"name": "triton", "failed": "RuntimeError: no such kernel"}


def test_a_process_that_hangs_or_crashes_is_named(gpu):
    assert gpu.ended([sys.executable, "-c", "import time; time.sleep(60)"], 1.0).startswith("stopped")
    assert gpu.ended([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == "the process ended with status 3"


def test_without_cuda_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert called(gpu, monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1
