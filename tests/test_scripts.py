"""The scripts that package a network and build the hub's folder."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from advmoe import networks
from advmoe.errors import UserError
from advmoe.models.digest import weights_digest
from advmoe.runs.load import load
from advmoe.training.checkpoint import RunFolder
from advmoe.training.manifest import Progress
from advmoe.training.start import network

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tiny: Any, splits: Any, tmp_path: Path) -> Path:
    """A run with an untrained network."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(tiny(), resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(network(tiny(), splits.spec).state_dict(), {}, Progress([row]), splits.fingerprint, splits.spec)
    return folder.path


@pytest.fixture
def packaged(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run as a network of the package."""
    (tmp_path / "networks").mkdir()
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    flags = ("--attacks", "pgd_10", "--limit-test", "8", "--device", "cpu")
    assert script("package_network").main(run, "tiny-net", *flags) == 0
    return "tiny-net"


def test_a_run_becomes_three_files_with_the_record_of_the_rounded_weights(packaged: str, run: Path) -> None:
    names = {path.name for path in networks.FOLDER.iterdir()}
    assert names == {"tiny-net.safetensors", "tiny-net.record.json", "tiny-net.md"}
    model, trained = load(packaged), load(run)
    assert model.record is not None
    assert model.record.weights == weights_digest(model.network) != weights_digest(trained.network)
    assert model.record.gallery == []
    x = torch.rand(4, *model.input_size)
    torch.testing.assert_close(model(x), trained(x), rtol=0.05, atol=0.05)
    assert 'advmoe.load("tiny-net")  # comes with the package advmoe' in (networks.FOLDER / "tiny-net.md").read_text()


def test_a_network_that_is_too_large_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    monkeypatch.setattr(networks, "MAX_FILE", 1000)
    with pytest.raises(UserError, match="bytes in float16; a network of the package may have 1,000"):
        script("package_network").write_weights(run, "tiny-net")
    assert not (tmp_path / "tiny-net.safetensors").exists()


def test_the_hubs_folder_is_read_by_the_hubs_library(packaged: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("huggingface_hub")
    module, folder = script("make_hub_folder"), tmp_path / "upload"
    module.main(packaged, "someone/robust", str(folder), "mit")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "record.json", "README.md"}
    assert f"next: hf upload someone/robust {folder}" in capsys.readouterr().out
    assert json.loads((folder / "record.json").read_text())["weights"] == weights_digest(load(folder).network)
    assert (folder / "model.safetensors").stat().st_size < 1.5 * networks.weights(packaged).stat().st_size  # float16 in both
    with pytest.raises(UserError, match="is not empty"):
        module.build(packaged, "someone/robust", folder)
    with pytest.raises(UserError, match="has no Record: advmoe evaluate"):
        module.build(str(run), "someone/robust", tmp_path / "other")
    with pytest.raises(UserError, match="the hub's library refuses it"):
        module.build(packaged, "no name at all", tmp_path / "third")


# Files that exist already


def test_a_network_that_is_too_large_leaves_the_packaged_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks").mkdir()
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    monkeypatch.setattr(networks, "MAX_FILE", 1000)
    networks.weights("tiny-net").write_bytes(b"old")
    with pytest.raises(UserError, match="bytes in float16"):
        script("package_network").write_weights(run, "tiny-net")
    assert networks.weights("tiny-net").read_bytes() == b"old"
    assert list(networks.FOLDER.iterdir()) == [networks.weights("tiny-net")]


def test_a_page_without_a_marker_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("update_docs")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BLOCKS", {"page.md": {"table": lambda: "new", "tabel": lambda: "new"}})
    page = "<!-- table -->\nold\n<!-- /table -->\n"
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(ValueError, match=r"page.md: has no block between <!-- tabel --> and <!-- /tabel -->"):
        module.main()
    assert (tmp_path / "page.md").read_text() == page


@pytest.mark.parametrize(("name", "variable"), [("faults", "FAULTS_REPORT"), ("fuzz", "FUZZ_REPORT")])
def test_an_interrupted_run_of_the_long_tests_leaves_the_results(name: str, variable: str, tmp_path: Path) -> None:
    """In a process of its own: pytest_configure and pytest_sessionfinish are those of tests/NAME/conftest.py."""
    folder, report = tmp_path / name, tmp_path / "report.json"
    folder.mkdir()
    for file in (ROOT / "tests" / name).glob("*.py"):
        if not file.name.startswith("test_"):
            (folder / file.name).symlink_to(file)
    row = {"fault": "x", "method": "advmoe", "tried": 1, "survived": 1, "reader": "x"}
    body = f"def test_first(request):\n    request.node.user_properties.append(({name.removesuffix('s')!r}, {row}))\n"
    body += "def test_second():\n    raise KeyboardInterrupt\n"
    (folder / "test_one.py").write_text(body)
    report.write_text("old")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(folder)])
    environment = {**os.environ, variable: str(report), "PYTHONPATH": paths}
    for selected, whole in (("test_one.py", False), ("test_one.py::test_first", True)):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", selected]
        subprocess.run(command, check=False, capture_output=True, cwd=folder, env=environment)
        assert (report.read_text() != "old") == whole
