"""Networks of the package: their three files belong together, and they are loaded by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import advmoe
from advmoe import networks
from advmoe.cli.main import main
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.evaluation import evaluate
from advmoe.evaluation.record_file import read_record
from advmoe.models.digest import weights_digest
from advmoe.reports.model_card import model_card
from advmoe.runs.evaluate import find_subject

EMBEDDED = "fashion-mnist"
IMAGES = 24  # that are attacked


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation without networks."""
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", networks.names())
def test_file_record_and_card_belong_together(name: str) -> None:
    weights, record = networks.weights(name), read_record(networks.record_file(name))
    assert weights.stat().st_size <= networks.MAX_FILE
    model = advmoe.load(name)
    assert weights_digest(model.network) == record.weights
    assert model.record == record
    assert record.gallery == []
    assert record.method == model.config.method
    card = (networks.FOLDER / f"{name}.md").read_text()
    assert card == model_card(record, name, model.classes, model.input_size)
    assert {path.name for path in networks.FOLDER.glob(f"{name}.*")} == {f"{name}.safetensors", f"{name}.record.json", f"{name}.md"}


@pytest.mark.parametrize("name", [name for name in networks.names() if name.startswith("demo-")])
def test_a_few_embedded_images_are_broken_as_the_record_says(name: str) -> None:
    """PGD-10 on a few test images breaks the same ones as in the Record, because an image's draws do not depend on the others."""
    model, record = advmoe.load(name), read_record(networks.record_file(name))
    splits = load_dataset(model.config.data.replace(limit_test=record.test_images))
    assert splits.fingerprint == record.fingerprint
    test = splits.test[torch.arange(IMAGES)]
    result = evaluate(
        model.network, test.pixels(), test.labels, epsilon=record.epsilon, preset=("pgd_10",), seed=record.attack_seed
    )
    broken = {row for row in record.evaluation.broken["pgd_10"] if row < IMAGES}
    assert len(broken ^ set(result.broken["pgd_10"])) <= 1  # rounding on another processor may change an image


def test_the_demos_networks_come_with_the_package() -> None:
    assert {"demo-advmoe", "demo-small-dense"} <= set(networks.names())


@pytest.mark.usefixtures("offline", "quick_attack")
def test_a_name_is_enough_to_classify_attack_and_evaluate(photo: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(photo.parent)
    assert main(["predict", "demo-advmoe", "photo.png", "--json", "--device", "cpu"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    prediction = advmoe.load("demo-advmoe").predict("photo.png")
    assert (row["class"], row["pathway"]) == (prediction.name, list(prediction.pathway))
    assert main(["attack", "demo-advmoe", "photo.png", "--epsilon", "0.2", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"]["class"] == prediction.name
    short = ["--attacks", "pgd_10", "--limit-test", "10", "--device", "cpu"]
    assert main(["evaluate", "demo-advmoe", *short]) == 0
    assert read_record(photo.parent / "demo-advmoe.record.json").test_images == 10  # in the working folder, not in the package
    assert not (networks.FOLDER / "demo-advmoe.evaluation").exists()
    capsys.readouterr()
    assert main(["evaluate", "demo-advmoe", *short, "--control", "demo-small-dense"]) == 2  # whose Record is of 200 images
    assert "demo-small-dense: was evaluated on other test images: not a control for this run" in capsys.readouterr().err


def test_an_unknown_name_lists_the_known_ones() -> None:
    for find in (advmoe.load, lambda name: find_subject(Path(name))):
        with pytest.raises(UserError, match=r"^demo-advmo: no run's folder, .*it has .*demo-advmoe, demo-small-dense"):
            find("demo-advmo")


def test_an_installation_without_networks_says_how_to_get_them(empty: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"this installation has none: install advmoe from a release wheel or .*advmoe train"):
        advmoe.load("demo-advmoe")
    assert main(["models"]) == 0
    assert "No networks: this installation has none: install advmoe from" in capsys.readouterr().out
    (empty / "net.record.json").write_text("{}")
    with pytest.raises(UserError, match=r"^net: its weights are not part of this installation: install advmoe from"):
        advmoe.load("net")


def test_models_lists_them_without_torch(capsys: Any) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "method", "data", "network", "GMACs", "SA", "RA-worst", "size"]
    for name, line in zip(networks.names(), lines[1 : 1 + len(networks.names())], strict=True):
        record = read_record(networks.record_file(name))
        assert line.startswith(f"{name} ")
        for text in (record.method, record.dataset, f"{record.gmacs:.4f}", f"{record.sa:.1f}", f" {record.worst:.1f}"):
            assert text in line
        assert ("at most" in line) == (record.ra_worst is None)
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == networks.names()
    assert all(row["bytes"] == Path(row["file"]).stat().st_size for row in rows)
    code = "import sys; from advmoe.cli.main import main; main(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
