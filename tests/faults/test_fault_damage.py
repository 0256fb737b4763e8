"""A truncated checkpoint or one with a flipped bit: its checksum detects it, a line reports it, and the previous one is used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import ALWAYS, SEED, assert_same, end, in_a_step, trained

from advmoe.training.checkpoint import RunFolder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

FILES = ("model.safetensors", "optimizers.pt", "manifest.json")
ArgumentsOf = Callable[..., list[str | Path]]


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip], ids=lambda damage: damage.__name__)
def test_damage_to_the_last_checkpoint(
    damage: Callable[[Path, random.Random], None], name: str, method: str, arguments_of: ArgumentsOf, run: Path,
    unbroken: Callable[[str], Path], tried: Callable[..., Any],
) -> None:  # fmt: skip
    expected = unbroken(method)
    shutil.copytree(expected, run)
    damage(RunFolder(run).checkpoint_folders()[-1] / name, random.Random(f"{SEED} {method} {name}"))
    last = RunFolder(run).checkpoint_folders()[-1]
    with tried(f"checkpoint {'cut short' if damage is cut else 'with a bit flipped'}", method):
        ended = trained(*arguments_of(method))
        output = " ".join(ended.text.split())
        assert f"checkpoint {last.name} is cut short or altered; epoch-{int(last.name[-4:]) - 1:04d} is used" in output
        assert_same(run, expected)


@pytest.mark.parametrize("name", FILES)
def test_damage_within_an_epoch(name: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path]) -> None:
    arguments = arguments_of("advmoe")
    with in_a_step([*arguments, *ALWAYS], run, 6) as process:
        process.kill()
        end(process)
    last = RunFolder(run).checkpoint_folders()[-1]
    assert last.name == "epoch-0001-000002"
    flip(last / name, random.Random(SEED))
    assert f"checkpoint {last.name} is cut short or altered" in " ".join(trained(*arguments).text.split())
    assert_same(run, unbroken("advmoe"))


def test_all_checkpoints_damaged(arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path]) -> None:
    shutil.copytree(unbroken("advmoe"), run)
    for folder in RunFolder(run).checkpoint_folders():
        cut(folder / "model.safetensors", random.Random(SEED))
    assert "training starts anew" in " ".join(trained(*arguments_of("advmoe")).text.split())
    assert_same(run, unbroken("advmoe"))
