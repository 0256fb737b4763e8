"""Listings that nobody reads, output in an encoding that lacks some characters, and help without torch."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.text import Text
from small_backbone import SMALL

from advmoe.cli.main import main
from advmoe.cli.streams import LOG_WIDTH, console

TINY = ["--recipe", "demo-advmoe", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TINY += ["--num-steps", "1", "--epochs", "2", "--device", "cpu"]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A pipeline in which `advmoe` runs this package; the status is that of its first command."""
    text = f'advmoe() {{ {shlex.quote(sys.executable)} -m advmoe "$@"; }}; {command}; exit ${{PIPESTATUS[0]}}'
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", text], check=False, capture_output=True, text=True, env=variables, timeout=120)


def test_tables_in_a_file_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == LOG_WIDTH
    monkeypatch.setenv("COLUMNS", "90")
    assert console().width == 90


def test_names_and_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("lr[best] :key:", Text("[/] 1.5"))
    assert capsys.readouterr().out == "lr[best] :key: [/] 1.5\n"


@pytest.mark.parametrize("command", ["advmoe --help | true", "advmoe recipes | true"])
def test_listings_end_quietly_when_the_reader_leaves(command: str) -> None:
    process = shell(command)
    assert process.returncode in (0, 141)
    assert process.stderr == ""


def in_ascii(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[str, str]:
    """What a command writes to streams of ASCII, as with PYTHONIOENCODING=ascii; its status is 0."""
    contents = [io.BytesIO(), io.BytesIO()]
    streams = [io.TextIOWrapper(content, encoding="ascii", write_through=True) for content in contents]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert main([str(argument) for argument in arguments]) == 0, arguments
    out, errors = (content.getvalue().decode("ascii") for content in contents)
    return out, errors


@pytest.mark.usefixtures("quick_attack")
def test_commands_write_to_an_ascii_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the run and that of the image have characters that ASCII lacks."""
    monkeypatch.setattr("advmoe.reports.write.FIGURES", {})
    run, photo, cpu = tmp_path / "né" / "dîner", tmp_path / "ça.png", ("--device", "cpu")
    Image.new("RGB", (28, 28), (90, 120, 60)).save(photo)
    lines = {
        "train": ("train", *TINY, "--backbone", SMALL, "--out", run),
        "evaluate": ("evaluate", run, "--attacks", "pgd_10", *cpu),
        "predict": ("predict", run, photo, *cpu),
        "csv": ("predict", run, photo, "--csv", *cpu),
        "attack": ("attack", run, photo, "--out", tmp_path / "à.png", *cpu),
        "watch": ("watch", tmp_path, "--once"),
        "report": ("report", tmp_path, "--out", tmp_path / "été"),
    }
    texts = {name: in_ascii(monkeypatch, *arguments) for name, arguments in lines.items()}
    parts = {
        "train": r"d\xeener", "evaluate": "RA-worst", "predict": r"\xe7a.png", "csv": r"\xe7a.png", "attack": r"\xe7a.png",
        "watch": r"d\xeener", "report": r"\xe9t\xe9",
    }  # fmt: skip
    for name, part in parts.items():
        assert part in texts[name][0], name
        assert "error" not in texts[name][1], name


LIGHT = """
import contextlib, io, sys
from advmoe.cli.main import COMMANDS, main
recipe = ["--recipe", "cifar10-vgg16_bn-advmoe-r0.2", "--help"]
lines = [[name, "--help"] for name in COMMANDS] + [["data", "get", "--help"], ["data", "check", "--help"], ["train", *recipe]]
lines += [["--help"], ["--version"], ["recipes"], ["recipes", "demo"], ["recipes", "demo", "--json"]]
lines += [["completion", "bash"], ["completion", "zsh"]]
for line in lines:
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        assert main(line) == 0, line
    assert text.getvalue(), line
    assert not sys.modules.keys() & {"torch", "numpy", "scipy", "PIL", "pyarrow", "matplotlib", "jinja2", "safetensors"}, line
"""


def test_help_completion_and_listings_are_quick_because_they_import_no_heavy_library() -> None:
    process = subprocess.run([sys.executable, "-c", LIGHT], check=False, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_waiting_threads_soon_sleep_unless_the_user_chose_otherwise() -> None:
    code = "import os, sys; sys.argv[1:] = ['--version']; from advmoe.__main__ import run\n"
    code += "try: run()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))"
    for chosen, value in (({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "9"}, "9")):
        variables = {name: text for name, text in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | chosen
        process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=variables)
        assert process.stdout.split()[-1] == value


# A standard output that is closed, or full


@pytest.mark.parametrize("command", ["models", "recipes demo", "train --help", "--version"])
def test_a_closed_output_is_no_error(command: str) -> None:
    process = shell(f"env -u PYTHONUNBUFFERED {shlex.quote(sys.executable)} -m advmoe {command} >&-")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["models", "train --help", "recipes", "recipes --json"])
def test_a_full_output_is_one_line(command: str) -> None:
    """The help and some listings are shorter than the buffer, so that they are written when the command has ended."""
    process = shell(f"env -u PYTHONUNBUFFERED {shlex.quote(sys.executable)} -m advmoe {command} > /dev/full")
    assert process.returncode == 2
    assert process.stderr.startswith("advmoe: error: ")
    assert "no space left on" in process.stderr.lower()
    assert process.stderr.count("\n") == 1
