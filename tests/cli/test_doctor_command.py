"""`advmoe doctor`."""

import json
import os
from importlib.metadata import version

import pytest
import torch

from advmoe.cli import doctor
from advmoe.cli.main import main
from advmoe.installation import Need


def set_needs(monkeypatch, package_needs, extra_needs):
    """Make the doctor see these needs of the package, and of its one extra."""
    monkeypatch.setattr(doctor, "extras", lambda package: ["hub"])
    monkeypatch.setattr(doctor, "needs", lambda package, name="": extra_needs if name else package_needs)


def test_versions_device_threads_and_disk(capsys, tmp_path):
    assert main(["doctor", "--folder", str(tmp_path / "not/yet"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["libraries"]["torch"] == report["torch"] == version("torch")
    assert (report["cores"], report["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert report["disk"]["folder"] == str(tmp_path)
    assert report["disk"]["free"] > 0
    assert report["extras"]["dev"]["missing"] == {}


def test_a_missing_extra_comes_with_its_command(monkeypatch, capsys):
    set_needs(monkeypatch, [Need("numpy>=2", "2.4")], [Need("datasets>=3", None), Need("pillow>=99", "12.0")])
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "hub          missing: datasets>=3, pillow>=99 (12.0 is installed) (the Hugging Face hub" in output
    assert "-m pip install" in output
    assert "'datasets>=3' 'pillow>=99'" in output
    assert "every command" not in output


def test_a_library_that_every_command_needs_ends_with_status_1(monkeypatch, capsys):
    set_needs(monkeypatch, [Need("numpy>=2", "1.26")], [])
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert "missing for every command: numpy>=2 (1.26 is installed)" in output
    assert "hub          installed" in output


def test_a_machine_whose_memory_is_unknown(monkeypatch, capsys):
    machine = doctor.Machine.of_this_process().model_copy(update={"memory": None, "gpu": "H200"})
    monkeypatch.setattr(doctor.Machine, "of_this_process", lambda: machine)
    set_needs(monkeypatch, [], [])
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "memory       unknown" in output
    assert "device       H200" in output


def test_what_the_device_can_do(monkeypatch, capsys):
    set_needs(monkeypatch, [], [])
    monkeypatch.setattr(doctor, "available", lambda device: ["auto", "split", "triton"])
    monkeypatch.setattr(doctor, "autocast_dtype", lambda config, device: None)
    monkeypatch.setattr(doctor, "has_compiler", lambda: False)
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "dispatch     auto, split, triton (Triton kernels run here)" in output
    assert "bf16         --precision auto takes float32: bf16 is slow or missing" in output
    assert "compiler     none for torch.compile on the CPU" in output
