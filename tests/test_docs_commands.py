"""The commands of each page of README and docs run in order, made small, with the Python that continues from them."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from cifar10 import write_batches
from PIL import Image
from small_backbone import SMALLEST

from advmoe.cli.main import main
from advmoe.cli.parsing import read
from advmoe.sweep.grid import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
ALONE = ("python", "text")  # tests/test_docs.py runs python; text is not run
NETWORK = ["--width", "4", "--limit-train", "40", "--batch-size", "20", "--epochs", "1", "--device", "cpu"]
SMALLER = {  # command -> flags that are appended
    "train": [*NETWORK, "--backbone", SMALLEST, "--limit-test", "10", "--num-steps", "1"],
    "evaluate": ["--limit-test", "4", "--device", "cpu"],
    "sweep": [*NETWORK, "--limit-test", "4", "--seeds", "1", "--only", "resnet18-at_small_dense", "--preset", "pgd_10"],
    "attack": ["--device", "cpu"],
}
OTHERS = {  # other shell lines; tests/test_packaging.py tests an installation
    "python3 -m venv .venv",
    ".venv/bin/pip install -c constraints.txt .",
    ". .venv/bin/activate",
}


def blocks(page):
    """(language, text) of each block of a page."""
    return BLOCK.findall(page.read_text())


def steps(page):
    """The commands and Python blocks of a page, in order."""
    for language, text in blocks(page):
        yield from ((language, line) for line in text.splitlines()) if language == "sh" else [(language, text)] * (language == "py")


@pytest.fixture
def working_folder(tmp_path, monkeypatch, quick_attack):
    """A folder with what the pages assume: images in class folders, photos, and CIFAR-10 by `advmoe data get`."""
    random = np.random.default_rng(0)
    for number in range(60):
        image(random, tmp_path / f"images/{'cats' if number % 2 else 'dogs'}/{number}.png")
    for name in ("rex", "tom"):
        image(random, tmp_path / f"photos/{name}.png")
    for name in ("photo.png", "photo.jpg"):
        image(random, tmp_path / name)
    monkeypatch.setattr("advmoe.cli.data.fetch", lambda name, to, console: [f"{name}: {write_batches(to)}"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def image(random, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)


def cases():
    """The pages with something to run; the one with a sweep is slow."""
    for page in PAGES:
        if any(steps(page)):
            yield pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name == "paper.md" else [])


@pytest.mark.parametrize("page", list(cases()))
def test_the_commands_of_a_page_run(page, working_folder):
    for language, text in steps(page):
        if language == "py":
            exec(compile(text, page.name, "exec"), {"__name__": "block"})
        else:
            run_shell_line(text)


def run_shell_line(line):
    """Run one line of a shell."""
    small = line.replace(" DIR ", " images ").replace("--image-size 64", "--image-size 32")
    arguments = shlex.split(small.removeprefix(".venv/bin/"), comments=True)
    if not arguments or " ".join(shlex.split(line, comments=True)) in OTHERS:
        return
    if arguments[0] == "make":
        assert f"\n{arguments[1]}:" in (ROOT / "Makefile").read_text()
        return
    substituted = re.fullmatch(r'eval "\$\((.*)\)"', line)
    arguments = substituted[1].split() if substituted else arguments
    assert arguments[0] == "advmoe", line
    if arguments[1] == "sweep" and arguments[2].startswith("results/"):  # takes hours
        assert read_sweep(str(ROOT / arguments[2])), line
        return
    if arguments[1] == "demo":  # takes minutes; tests/cli/test_demo_command.py runs a small one
        assert read("demo", arguments[2:]), line
        return
    assert main([*arguments[1:], *SMALLER.get(arguments[1], [])]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_language_that_is_run(page):
    assert {language for language, _ in blocks(page)} <= {"sh", "py", "yaml", *ALONE}


@pytest.mark.parametrize("text", [text for page in PAGES for language, text in blocks(page) if language == "yaml"])
def test_yaml_is_a_sweep(text, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert read_sweep(str(path))
