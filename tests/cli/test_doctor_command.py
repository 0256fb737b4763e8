"""`advmoe doctor` as a person meets it."""

import json
from importlib.metadata import version

import pytest

from advmoe.cli import doctor
from advmoe.cli.main import main
from advmoe.installation import Need


def words(monkeypatch, own, extra):
    """The doctor where the package asks for `own`, and its one extra for `extra`."""
    monkeypatch.setattr(doctor, "extras", lambda package: ["hub"])
    monkeypatch.setattr(doctor, "needs", lambda package, name="": extra if name else own)


def test_versions_device_threads_and_disk(capsys, tmp_path):
    assert main(["doctor", "--folder", str(tmp_path / "not/yet"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["libraries"]["torch"] == found["torch"] == version("torch")
    assert found["cores"] >= found["threads"] >= 1
    assert found["disk"]["folder"] == str(tmp_path)
    assert found["disk"]["free"] > 0
    assert found["extras"]["dev"]["missing"] == {}


def test_a_missing_extra_comes_with_its_command(monkeypatch, capsys):
    words(monkeypatch, [Need("numpy>=2", "2.4")], [Need("datasets>=3", None), Need("pillow>=99", "12.0")])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "hub          missing: datasets>=3, pillow>=99 (12.0 is installed) (the Hugging Face hub" in said
    assert "-m pip install" in said
    assert "'datasets>=3' 'pillow>=99'" in said
    assert "every command" not in said


def test_a_library_that_every_command_needs_ends_with_status_1(monkeypatch, capsys):
    words(monkeypatch, [Need("numpy>=2", "1.26")], [])
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "missing for every command: numpy>=2 (1.26 is installed)" in said
    assert "hub          installed" in said


def test_a_machine_whose_memory_is_unknown(monkeypatch, capsys):
    machine = doctor.Machine.here().model_copy(update={"memory": None, "gpu": "H200"})
    monkeypatch.setattr(doctor.Machine, "here", lambda: machine)
    words(monkeypatch, [], [])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "memory       unknown" in said
    assert "device       H200" in said


def test_what_the_device_can_do(monkeypatch, capsys):
    words(monkeypatch, [], [])
    monkeypatch.setattr(doctor, "available", lambda device: ["auto", "split", "triton"])
    monkeypatch.setattr(doctor, "autocast", lambda config, device: None)
    monkeypatch.setattr(doctor, "has_compiler", lambda: False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "dispatch     auto, split, triton (Triton kernels run here)" in printed
    assert "bf16         --precision auto takes float32: bf16 is slow or missing" in printed
    assert "compiler     none for torch.compile on the CPU" in printed
