"""What older versions wrote loads, evaluates and goes on; newer schemas are refused in one line (tests/fixtures/versions)."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from refusal import refusal

import advmoe
from advmoe import migrations
from advmoe.cli.main import main
from advmoe.config import RunConfig, from_dict
from advmoe.data import load_dataset
from advmoe.evaluation.record import SCHEMA as RECORD_SCHEMA
from advmoe.evaluation.record_file import read_record
from advmoe.evaluation.snapshot import Snapshot
from advmoe.reports.collect import collect
from advmoe.reports.settings import settings
from advmoe.runs.load import KEY
from advmoe.runs.status import read_run
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.manifest import SCHEMA as MANIFEST_SCHEMA
from advmoe.training.manifest import seal
from advmoe.training.start import best_network

FIXTURES = Path(__file__).parent / "fixtures" / "versions"
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in FIXTURES.glob("*.tar.xz"))
NEVER_EVALUATED = "unsealed"
OF_SHARED_NORMS = ("unsealed", "before-phases", "shared-norms")  # as everything was then


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[str], Path]:
    """kept(version): a folder with a copy of what that version wrote."""

    def unpack(version: str) -> Path:
        shutil.unpack_archive(FIXTURES / f"{version}.tar.xz", tmp_path / version, filter="data")
        return tmp_path / version

    return unpack


def seal_again(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's manifest, as whoever wrote them would have sealed it."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **fields}
    manifest.pop("seal", None)
    path.write_text(json.dumps({**manifest, "seal": seal(manifest)}))


def test_every_version_is_kept_and_described() -> None:
    told = (FIXTURES / "README.md").read_text()
    assert len(VERSIONS) >= 5
    assert [path.name for path in sorted(FIXTURES.iterdir()) if f"| `{path.name}` |" not in told] == ["README.md"]
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 400_000


@pytest.mark.parametrize("version", VERSIONS)
def test_a_network_answers_as_it_did(version: str, kept: Callable[[str], Path]) -> None:
    place = kept(version)
    folder = RunFolder(place / "run")
    config = folder.config()
    splits = load_dataset(config.data)
    model = best_network(RunFolder(place / "run").best(), config, splits)
    wanted = torch.tensor(json.loads((place / "logits.json").read_text()))
    assert folder.best().epoch == 1
    assert wanted.std(dim=0).min() > 1e-4  # the images are told apart, so that a wrong route or layer would show
    torch.testing.assert_close(model(splits.test.pixels()), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(advmoe.load(place / "run")(splits.test.pixels()), model(splits.test.pixels()))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_continues(version: str, kept: Callable[[str], Path]) -> None:
    run = kept(version) / "run"
    config, recorder = RunFolder(run).config(), Recorder()
    before = RunFolder(run).latest()
    assert before is not None
    assert read_run(run).epoch == 1
    history = train(config, load_dataset(config.data), run, recorder, resume=True)
    assert history[:1] == before.history
    assert [(row["epoch"], row["phase"]) for row in history] == [(1, 1), (2, 1)]
    assert recorder.notes == []
    assert RunFolder(run).damaged() == []
    assert history[1]["iterations"] == 2


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != NEVER_EVALUATED])
def test_a_record_is_reported(version: str, kept: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    run = kept(version) / "run"
    (record,) = collect(run)
    assert caplog.messages == []
    assert record.from_schema == (None if version == "image-names" else 1 if version in OF_SHARED_NORMS else 2)
    assert len(record.history) == (record.from_schema != 1)
    assert settings(record)["model.norms"] == ("shared" if record.from_schema == 1 else "per_expert")
    config = from_dict(record.config.model_dump())
    assert config == RunFolder(run).config().replace(data=config.data)


def test_a_record_of_accuracies_alone_is_refused_for_what_it_lacks() -> None:
    path = FIXTURES / "accuracies.json"
    assert refusal(read_record, path) == f"{path}: holds no Record (norm is missing)"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_is_evaluated(
    version: str, kept: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again, and past what the version kept of its own evaluation: a network that answers to the last bit as it did goes on there,
    any other is told of and evaluated with --fresh."""
    monkeypatch.setattr("advmoe.evaluation.make_record.snapshot", lambda *_: Snapshot())  # it needs only the network
    run = kept(version) / "run"
    words = ["evaluate", str(run), "--attacks", "pgd_10", "--device", "cpu"]
    status = main(words)
    if status:
        assert "--fresh" in capsys.readouterr().err
        assert main([*words, "--fresh"]) == 0
    record = read_record(run / "record.json")
    assert (record.schema_number, record.from_schema, record.epoch) == (RECORD_SCHEMA, None, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_configuration_has_its_own_defaults(version: str, kept: Callable[[str], Path]) -> None:
    config = RunFolder(kept(version) / "run").config()
    assert config.model.norms == ("shared" if version in OF_SHARED_NORMS else "per_expert")
    assert from_dict(migrations.config(advmoe.config.to_dict(RunConfig()))) == RunConfig()


def test_a_configuration_written_by_hand_has_the_present_defaults() -> None:
    assert migrations.config({"model": {"width": 4}}) == {"model": {"width": 4}}
    assert migrations.config({"model": None}) == {"model": None}


def test_a_file_with_a_network_loads(kept: Callable[[str], Path]) -> None:
    place = kept("image-spec")
    model = advmoe.load(place / "network.safetensors")
    pixels = load_dataset(model.config.data).test.pixels()
    wanted = torch.tensor(json.loads((place / "logits.json").read_text()))
    torch.testing.assert_close(model(pixels), wanted, rtol=1e-5, atol=1e-6)
    assert model.record is not None


# Newer ones


def newer_checkpoint(place: Path) -> Callable[[], Any]:
    seal_again(place / "run" / "checkpoints" / "epoch-0001", schema=99)
    return RunFolder(place / "run").latest


def newer_configuration(place: Path) -> Callable[[], Any]:
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("schema: 1", "schema: 99"))
    return RunFolder(place / "run").config


def newer_record(place: Path) -> Callable[[], Any]:
    path = place / "run" / "record.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 99', 1))
    return lambda: read_record(path)


def newer_file(place: Path) -> Callable[[], Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = place / "network.safetensors"
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    save_file(load_file(path), path, {**header, KEY: header[KEY].replace('"schema": 1', '"schema": 99', 1)})
    return lambda: advmoe.load(path)


@pytest.mark.parametrize("change", [newer_checkpoint, newer_configuration, newer_record, newer_file])
def test_a_newer_schema_is_refused_with_both_numbers(
    change: Callable[[Path], Callable[[], Any]], kept: Callable[[str], Path]
) -> None:
    present = RECORD_SCHEMA if change is newer_record else MANIFEST_SCHEMA if change is newer_checkpoint else 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = refusal(change(kept("image-spec")))
    assert "99" in text
    assert str(present) in text.partition("99")[2]


def test_a_newer_store_is_refused(kept: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = kept("image-spec") / "run"
    path = run / "evaluation" / "key.json"
    from advmoe.evaluation import store

    content = store._read(path)
    store._write(path, {**content, "schema": 99})
    assert main(["evaluate", str(run), "--quick", "--device", "cpu"]) == 2
    assert "holds results of another version of advmoe" in capsys.readouterr().err


# Names


def test_names_of_other_networks_stay() -> None:
    for state in ({"stem.1.weight": 1, "blocks.0.shortcut.0.weight": 2}, {"stem.weight": 1, "blocks.0.norm1.weight": 2}):
        assert migrations.tensors(state, 1) == state


def test_old_names_in_a_checkpoint_of_today_are_those_of_another_network() -> None:
    state = {"stem.1.weight": 1, "blocks.0.norm1.weight": 2}
    assert migrations.tensors(state, 2) == state
    assert migrations.tensors(state, 1) == {"stem.0.norm.weight": 1, "blocks.0.conv1.norm.weight": 2}


def test_a_sealed_manifest_never_passes_for_an_unsealed_one() -> None:
    fields = dict.fromkeys(migrations.UNSEALED)
    assert migrations.is_unsealed(fields)
    assert not migrations.is_unsealed({**fields, "seal": ""})
    assert not migrations.is_unsealed({**fields, "seam": ""})
    assert not migrations.is_unsealed({name: None for name in fields if name != "schema"})
