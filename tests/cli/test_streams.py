"""Output that nobody reads, or that its encoding cannot hold; help without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from advmoe.cli.display import _duration
from advmoe.cli.main import main

TINY = ["--recipe", "demo-advmoe", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TINY += ["--num-steps", "1", "--epochs", "4", "--device", "cpu"]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A pipeline in which `advmoe` is this package's; its status is the first command's."""
    text = f'advmoe() {{ {sys.executable} -m advmoe "$@"; }}; {command}; exit ${{PIPESTATUS[0]}}'
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", text], check=False, capture_output=True, text=True, env=variables, timeout=120)


@pytest.mark.parametrize("command", ["advmoe --help | true", "advmoe profile --paper | head -1"])
def test_listings_end_quietly_when_the_reader_leaves(command: str) -> None:
    done = shell(command)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_training_goes_on_unread(tmp_path: Path) -> None:
    done = shell(f"advmoe train {' '.join(TINY)} --out {tmp_path / 'run'} | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert " left" in done.stdout
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["training"]["epochs"] == 4
    photo = tmp_path / "ça.png"
    Image.new("RGB", (28, 28)).save(photo)
    for more in ("", "--csv"):
        done = shell(f"advmoe predict {tmp_path / 'run'} '{photo}' {more}", PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert "a.png" in done.stdout


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from advmoe.cli.main import main; main(['--help']); main(['--version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    assert main(["--help"]) == 0
    assert "advmoe COMMAND --help" in capsys.readouterr().out


def test_waiting_threads_sleep_unless_the_user_chose() -> None:
    code = "import os, sys; sys.argv[1:] = ['--version']; from advmoe.__main__ import run\n"
    code += "try: run()\nexcept SystemExit: print(os.environ.get('OMP_WAIT_POLICY'))"
    for chosen, value in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, "None")):
        variables = {name: text for name, text in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | chosen
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=variables)
        assert done.stdout.split()[-1] == value


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
