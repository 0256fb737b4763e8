"""The scripts that package a network and build the hub's folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import package_network
import pytest
import torch
import update_docs

from advmoe import networks
from advmoe.errors import UserError
from advmoe.models.digest import weights_digest
from advmoe.runs.load import load
from advmoe.training.checkpoint import RunFolder
from advmoe.training.manifest import Progress
from advmoe.training.start import network

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tiny: Any, splits: Any, tmp_path: Path) -> Path:
    """A run with an untrained network."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(tiny(), resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    weights = network(tiny(), splits.spec).state_dict()
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(6902)  # float16 cannot hold it
    folder.save(weights, {}, Progress([row]), splits.fingerprint, splits.spec)
    return folder.path


@pytest.fixture
def packaged(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run as a network of the package."""
    (tmp_path / "networks").mkdir()
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    flags = ("--attacks", "pgd_10", "--limit-test", "8", "--device", "cpu")
    assert package_network.main(run, "tiny-net", *flags) == 0
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


@pytest.mark.parametrize("flags", [("--part", "0", "2"), ("--name", "other")])
def test_flags_that_give_no_record_are_refused_first(run: Path, tmp_path: Path, monkeypatch: Any, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    with pytest.raises(UserError, match="give no Record of the package's network"):
        package_network.main(run, "tiny-net", *flags)
    assert not (tmp_path / "networks").exists()


def test_a_network_that_is_too_large_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    monkeypatch.setattr(networks, "MAX_FILE", 1000)
    with pytest.raises(UserError, match="bytes in float16; a network of the package may have 1,000"):
        package_network.write_weights(run, networks.weights("tiny-net"))
    assert not (tmp_path / "tiny-net.safetensors").exists()


def test_the_hubs_folder_is_read_by_the_hubs_library(packaged: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("huggingface_hub")
    import make_hub_folder  # needs the extra hub

    folder = tmp_path / "upload"
    make_hub_folder.main(packaged, "someone/robust", str(folder), "mit")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "record.json", "README.md"}
    assert f"next: hf upload someone/robust {folder}" in capsys.readouterr().out
    assert json.loads((folder / "record.json").read_text())["weights"] == weights_digest(load(folder).network)
    assert (folder / "model.safetensors").stat().st_size < 1.5 * networks.weights(packaged).stat().st_size  # float16 in both
    for taken in (folder, folder / "README.md"):
        with pytest.raises(UserError, match="is not an empty folder"):
            make_hub_folder.build(packaged, "someone/robust", taken)
    with pytest.raises(UserError, match="has no Record: advmoe evaluate"):
        make_hub_folder.build(str(run), "someone/robust", tmp_path / "other")
    with pytest.raises(UserError, match="the hub's library refuses it"):
        make_hub_folder.build(packaged, "no name at all", tmp_path / "third")
    with pytest.raises(UserError, match="must be owner/name"):  # the hub's library takes it, `advmoe.load` would not
        make_hub_folder.build(packaged, "robust", tmp_path / "third")
    with pytest.raises(UserError, match="license must be an identifier of the hub"):
        make_hub_folder.build(packaged, "someone/robust", tmp_path / "third", "MIT License")
    assert not (tmp_path / "third").exists()


# Files that exist already


def test_a_network_that_is_too_large_leaves_the_packaged_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks").mkdir()
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    monkeypatch.setattr(networks, "MAX_FILE", 1000)
    networks.weights("tiny-net").write_bytes(b"old")
    with pytest.raises(UserError, match="bytes in float16"):
        package_network.write_weights(run, networks.weights("tiny-net"))
    assert networks.weights("tiny-net").read_bytes() == b"old"
    assert list(networks.FOLDER.iterdir()) == [networks.weights("tiny-net")]


def test_a_page_without_a_marker_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    monkeypatch.setattr(update_docs, "BLOCKS", {"page.md": {"table": lambda: "new", "tabel": lambda: "new"}})
    page = "<!-- table -->\nold\n<!-- /table -->\n"
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(ValueError, match=r"page.md: has no block between <!-- tabel --> and <!-- /tabel -->"):
        update_docs.main()
    assert (tmp_path / "page.md").read_text() == page


def test_an_interrupted_run_of_the_fault_tests_leaves_the_results(tmp_path: Path) -> None:
    """In a process of its own, with the conftest.py of tests/faults."""
    report = tmp_path / "report.json"
    for file in (ROOT / "tests/faults").glob("*.py"):
        if not file.name.startswith("test_"):
            (tmp_path / file.name).symlink_to(file)
    row = {"fault": "x", "method": "advmoe", "tried": 1, "survived": 1}
    body = f"def test_first(request):\n    request.node.user_properties.append(('faults', {row}))\n"
    body += "def test_second():\n    raise KeyboardInterrupt\n"
    (tmp_path / "test_one.py").write_text(body)
    report.write_text("old")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(tmp_path)])
    environment = {**os.environ, "FAULTS_REPORT": str(report), "PYTHONPATH": paths}
    for selected, whole in (("test_one.py", False), ("test_one.py::test_first", True)):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", selected]
        subprocess.run(command, check=False, capture_output=True, cwd=tmp_path, env=environment)
        assert (report.read_text() != "old") == whole
