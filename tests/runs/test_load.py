"""Loading a trained network from its run's folder, from one file and from the hub."""

import json
import logging
import os
import pickle
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from refusal import refusal
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

import advmoe
from advmoe.benchmark.memory import peak
from advmoe.config import to_dict
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.evaluation import EvaluationOptions
from advmoe.evaluation.record_file import checked_record, read_record, write_record
from advmoe.files import write_json
from advmoe.moe import ForcedGate
from advmoe.publish import push_to_hub, write_hub_folder
from advmoe.runs.evaluate import evaluate_folder, find_subject
from advmoe.runs.load import from_pretrained, load, save_file
from advmoe.runs.loaded import Loaded, ThreatModel
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.manifest import Progress
from advmoe.training.start import best_network, network

SPEC = ImageSpec(("cat", "dog", "frog"), (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PIXELS = torch.rand((6, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def untrained(path: Path, config: Any, spec: ImageSpec | None = SPEC) -> Path:
    """A run with one checkpoint of an untrained network."""
    folder = RunFolder(path)
    folder.claim(config, resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(network(config, SPEC).state_dict(), {}, Progress([row]), "f" * 64, spec)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(PIXELS)


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> Path:
    return untrained(tmp_path / "run", tiny(epsilon=0.03))


@pytest.fixture(scope="module")
def evaluated(tiny: Any, splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with its Record."""
    from recorder import Recorder

    path, config = tmp_path_factory.mktemp("runs") / "run", tiny(epochs=1)
    few = replace(splits, val=splits.val[torch.arange(10)], test=splits.test[torch.arange(5)])
    train(config, few, path, Recorder())
    write_record(path / "record.json", evaluate_folder(path, config, few, EvaluationOptions(0.1, preset=("pgd_10",))))
    return path


# A run's folder


def test_a_loaded_network_knows_its_classes_and_threat_model_without_the_data(run: Path) -> None:
    model = load(run)
    assert isinstance(model, torch.nn.Module)
    assert not any(module.training for module in model.modules())
    assert (model.classes, model.input_size) == (SPEC.classes, SPEC.shape)
    assert model.threat_model == ThreatModel("Linf", 0.03)
    assert (model.record, model.epoch, model.config.method) == (None, 1, "advmoe")


def test_the_loaded_network_is_the_one_that_is_evaluated(evaluated: Path, tiny: Any, splits: Any) -> None:
    model, network = load(str(evaluated)), best_network(RunFolder(evaluated).best(), tiny(epochs=1), splits)
    x = splits.test.pixels()
    with torch.inference_mode():
        assert torch.equal(model(x), network(x))
        route = torch.ones((len(x), len(network.moe_layers())), dtype=torch.long)
        _, routings = model.forward_routed(x, ForcedGate(route))
    assert all((routing.experts == 1).all() for routing in routings)
    assert (model.epoch, model.spec) == (RunFolder(evaluated).best().epoch, splits.spec)
    assert model.record == read_record(evaluated / "record.json")


def test_record_of_another_epoch_or_data_is_not_its_record(evaluated: Path, tmp_path: Path) -> None:
    run = shutil.copytree(evaluated, tmp_path / "run")
    record = json.loads((run / "record.json").read_text())
    for change in ({"epoch": 7}, {"fingerprint": "0" * 64}, {"seed": 5}):
        write_json(run / "record.json", record | change)
        assert load(run).record is None


def test_older_checkpoints_take_the_images_from_their_data(tiny: Any, tmp_path: Path) -> None:
    cifar = replace(SPEC, classes=tuple("abcdefghij"))
    run = untrained(tmp_path / "run", tiny(dataset="folder", data_dir=str(tmp_path / "gone")), spec=None)
    message = refusal(load, run)
    assert message.startswith(f"{run}: its checkpoints do not describe its images")
    assert f"{tmp_path / 'gone'}: no such file" in message
    config = tiny(dataset="cifar10")
    folder = RunFolder(tmp_path / "old")
    folder.claim(config, resume=False)
    folder.save(network(config, cifar).state_dict(), {}, Progress([{"epoch": 1, "phase": 1, "score": 1.0}]), "f" * 64)
    assert load(tmp_path / "old").classes[0] == "airplane"


def test_the_kernels_used_in_training_are_not_required(tiny: Any, tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", tiny(dispatch="triton"))
    assert torch.isfinite(logits(load(run))).all()


def test_a_path_without_a_network_is_an_error_of_one_line(tmp_path: Path, tiny: Any) -> None:
    assert "holds no run (no config.yaml)" in refusal(load, tmp_path)
    RunFolder(tmp_path / "run").claim(tiny(), resume=False)
    assert refusal(load, tmp_path / "run") == f"{tmp_path / 'run'}: holds no checkpoint yet"
    assert "no run's folder, no file, no name on the hub (owner/name), and no network of" in refusal(load, tmp_path / "nowhere")


# One file


@pytest.mark.parametrize("backbone", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40"])
@pytest.mark.parametrize("method", ["at_dense", "at_small_dense", "at_sparse", "advmoe"])
def test_a_file_gives_the_same_logits_and_settings(tiny: Any, tmp_path: Path, backbone: str, method: str) -> None:
    model = load(untrained(tmp_path / "run", tiny(method, backbone=backbone, width=30, model_scale=0.35)))
    save_file(model, tmp_path / "net.safetensors")
    shutil.rmtree(tmp_path / "run")
    loaded = load(tmp_path / "net.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.spec, loaded.epoch, loaded.threat_model) == (model.spec, model.epoch, model.threat_model)
    assert loaded.config.method == method
    assert not loaded.training


def test_file_holds_the_record_and_no_path(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(evaluated)
    model.config = model.config.replace(data=model.config.data.replace(data_dir="/home/me"))
    monkeypatch.chdir(tmp_path)
    save_file(model, "net.safetensors")
    assert model.record is not None
    assert load("net.safetensors").record == model.record.without_images()
    assert load("net.safetensors").config.data.data_dir is None
    content = Path("net.safetensors").read_bytes()
    assert b"/home/me" not in content
    assert b"png" not in content  # without the test images
    save_file(model, "net.safetensors", images=True)
    assert load("net.safetensors").record == model.record
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_half_precision_halves_the_file_and_keeps_a_record_of_the_same_weights(
    evaluated: Path, tmp_path: Path, caplog: Any
) -> None:
    model = load(evaluated)
    save_file(model, tmp_path / "full.safetensors")
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        save_file(model, tmp_path / "half.safetensors", half=True)
    assert "written without the Record" in caplog.messages[0]
    state, rounded = model.network.state_dict(), load(tmp_path / "half.safetensors")
    for name, tensor in rounded.network.state_dict().items():
        assert torch.equal(tensor, state[name].half().to(tensor.dtype) if tensor.is_floating_point() else state[name])
    sizes = [sum(tensor.nbytes for tensor in load_tensors(tmp_path / f"{name}.safetensors").values()) for name in ("half", "full")]
    assert sizes[0] < 0.55 * sizes[1]
    with_record = Loaded(rounded.network, model.config, model.spec, model.epoch, model.record)
    save_file(with_record, tmp_path / "with_record.safetensors", half=True)
    assert len(caplog.messages) == 1
    with torch.no_grad():
        next(rounded.network.parameters()).fill_(1e6)
    assert "has values beyond float16's range" in refusal(save_file, rounded, tmp_path / "x.safetensors", half=True)


def test_a_record_beside_a_file_is_its_record(evaluated: Path, tmp_path: Path) -> None:
    """`advmoe evaluate FILE` writes one."""
    model = load(evaluated)
    assert model.record is not None
    save_file(Loaded(model.network, model.config, model.spec, model.epoch), tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors").record is None
    shutil.copy(evaluated / "record.json", tmp_path / "net.record.json")
    assert load(tmp_path / "net.safetensors").record == model.record.without_images()


@pytest.mark.parametrize("fault", ["other weights", "damaged"])
def test_a_record_beside_a_file_that_is_not_its_own_hides_not_the_one_in_the_header(
    evaluated: Path, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(evaluated)
    assert model.record is not None
    save_file(model, tmp_path / "net.safetensors")
    other = json.loads((evaluated / "record.json").read_text()) | {"weights": "0" * 64}
    (tmp_path / "net.record.json").write_text("{" if fault == "damaged" else json.dumps(other))
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        assert load(tmp_path / "net.safetensors").record == model.record.without_images()
    assert len(caplog.messages) == 1
    assert "net" in caplog.messages[0]


def test_a_run_with_a_damaged_record_is_loaded_without_it(
    evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(evaluated, tmp_path / "run")
    (run / "record.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        assert load(run).record is None
    assert "record.json: " in caplog.messages[0]


def test_a_file_is_not_saved_into_a_missing_folder(run: Path, tmp_path: Path) -> None:
    assert "no such folder for net.safetensors" in refusal(save_file, load(run), tmp_path / "no" / "net.safetensors")


def test_other_files_are_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"hello")
    assert "not a safetensors file" in refusal(load, path)
    save_file(load(run), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a safetensors file" in refusal(load, path)
    weights = next(run.glob("checkpoints/*/model.safetensors"))
    assert "names no network in its header; give the folder of a run" in refusal(load, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "is of schema 99; this advmoe reads 1"),
        ({"config": {"method": "advmoo"}}, "unknown method 'advmoo'"),
        ({"config": {"model": {"width": "x"}}}, "model.width must be int"),
        ({"config": {"model": {"width": 8}}}, "its header and weights make no network"),
        ({"spec": {"shape": [3, 32]}}, "its header and weights make no network"),
        ({"spec": None}, "its header and weights make no network"),
        ({"record": {"schema": 1}}, "holds no Record"),
        ({"epoch": None}, "its header and weights make no network"),
    ],
)
def test_altered_headers_are_refused_in_a_line(run: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    model = load(run)
    save_file(model, path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["advmoe"])
    content |= change
    save_tensors(model.network.state_dict(), path, {"advmoe": json.dumps(content)})
    assert message in refusal(load, path)


def test_weights_of_another_network_are_refused_with_a_tensors_name(run: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", load(run)
    save_file(model, path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    state = model.network.state_dict()
    for name, change, message in (
        ("normalize.mean", None, "it has no tensor normalize.mean"),
        ("more", torch.zeros(3), "it has a tensor more that the configuration does not describe"),
        ("normalize.mean", torch.zeros(3), "normalize.mean is of shape (3,), not ("),
    ):
        changed = {key: tensor for key, tensor in {**state, name: change}.items() if tensor is not None}
        save_tensors(changed, path, header)
        assert message in refusal(load, path)


# The hub


class HfHubHTTPError(Exception):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class Hub:
    """The parts of huggingface_hub that are used, with repositories in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.network = root, True
        self.public: tuple[str, ...] = ()

    def hf_hub_url(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        return f"https://hub.example/{repo_id}/{filename}"

    def get_hf_file_metadata(self, url: str) -> None:
        if not self.network:
            raise ConnectionError("no route")

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("Cannot find the requested files\nin the disk cache")
        if not (self.root / repo_id).is_dir():
            raise RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found for url")
        return str(self.root / repo_id / filename)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if not self.network:
            raise ConnectionError("no route")
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.example/{repo_id}"

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=repo_id not in self.public)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_a_published_network_is_loaded_from_the_hub(evaluated: Path, hub: Hub) -> None:
    assert push_to_hub(evaluated, "someone/robust") == "https://hub.example/someone/robust"
    folder, published = hub.root / "someone/robust", load(evaluated)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "record.json", "README.md"}
    x = torch.rand(4, 1, 28, 28)
    for loaded in (from_pretrained("someone/robust"), load("someone/robust"), load(folder)):
        assert isinstance(loaded, Loaded)
        with torch.inference_mode():
            assert torch.equal(loaded(x), published(x))
        assert published.record is not None
        assert loaded.record == published.record.without_images()
    assert "png" not in (folder / "record.json").read_text()
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "advmoe"
    assert published.record is not None
    assert f"**{published.record.ra_worst_quick:.1f} %** of 5 test images" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    push_to_hub(evaluated, "someone/robust", images=True, license="apache-2.0")
    assert yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["license"] == "apache-2.0"
    assert load(folder).record == published.record


def test_nothing_private_is_written_to_a_public_repository(evaluated: Path, hub: Hub) -> None:
    """The library's create_repo accepts an existing repository, and ignores `private` then."""
    hub.public = ("someone/open",)
    assert "someone/open: exists on the hub and is public" in refusal(lambda: push_to_hub(evaluated, "someone/open", private=True))
    assert not list((hub.root / "someone/open").iterdir())
    push_to_hub(evaluated, "someone/closed", private=True)
    assert (hub.root / "someone/closed/README.md").exists()


def test_folders_of_the_machine_are_not_published(evaluated: Path, tmp_path: Path) -> None:
    model = load(evaluated)
    training = model.config.training.replace(teacher="/home/me/runs/wide-s0", init_from="/home/me/runs/dense-s0")
    model.config = model.config.replace(
        training=training, data=model.config.data.replace(data_dir="/home/me/data", generated="/home/me/edm.npz")
    )
    assert model.record is not None
    record = model.record.to_json()
    record |= {"config": to_dict(model.config), "teacher": {"path": "/home/me/runs/wide-s0", "weights": "abc"}}
    model.record = checked_record(record, "record")
    write_hub_folder(model, tmp_path, "someone/robust")
    for name in ("config.yaml", "record.json", "README.md", "model.safetensors"):
        assert b"/home/me/runs" not in (tmp_path / name).read_bytes()
        assert b"/home/me/edm" not in (tmp_path / name).read_bytes()
    loaded = load(tmp_path / "model.safetensors")
    assert (loaded.config.training.teacher, loaded.config.training.init_from) == ("wide-s0", "dense-s0")
    assert (loaded.config.data.generated, loaded.config.data.data_dir) == ("edm.npz", None)
    assert loaded.record is not None
    assert loaded.record.teacher is not None
    assert loaded.record.teacher.path == "wide-s0"


def test_a_missing_run_in_an_existing_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("advmoe.hub.fetch", lambda *_: pytest.fail("asks the hub"))
    (tmp_path / "runs").mkdir()
    for ask in (load, lambda what: find_subject(Path(what))):
        assert refusal(ask, "runs/none").startswith("runs/none: no such run or file (a name on the hub, owner/name, is looked up")


def test_nothing_is_published_that_was_not_measured(run: Path, hub: Hub) -> None:
    assert f"advmoe evaluate {run}" in refusal(push_to_hub, run, "someone/robust")
    assert not hub.root.exists()


def test_unknown_name_and_no_network_are_a_line_each(hub: Hub, evaluated: Path) -> None:
    assert (
        "someone/typo: no such file or folder, and it cannot be downloaded from the hub (the hub has no repository of that name"
        in refusal(load, "someone/typo")
    )
    hub.network = False
    assert "(the hub cannot be reached, or HF_HUB_OFFLINE is set, and the network is not in the local cache)" in refusal(
        load, "someone/typo"
    )
    assert "could not be written to the hub (ConnectionError: no route)" in refusal(push_to_hub, evaluated, "someone/robust")
    assert "must be owner/name" in refusal(push_to_hub, evaluated, "robust")
    with pytest.raises(UserError, match=r"license must be an identifier of the hub, such as mit, .*not 'MIT: no'"):
        push_to_hub(evaluated, "someone/robust", license="MIT: no")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'advmoe[hub]'" in refusal(load, "someone/robust")


# The package


def test_names_of_the_package_are_imported_when_requested() -> None:
    assert advmoe.load is load
    assert set(advmoe.__all__) == {"Loaded", "from_pretrained", "load", "push_to_hub", "save_file"}
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        advmoe.lode  # noqa: B018


# Hostile files


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors"])
def test_code_in_a_file_does_not_run(name: str, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {shlex.quote(str(tmp_path / 'ran'))}",)

    torch.save({"weights": Touch()}, tmp_path / name)
    assert "not a safetensors file" in refusal(load, tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Touch()))
    assert "not a safetensors file" in refusal(load, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"width": 10**6}), ("model", {"num_experts": 1000, "bank": "disjoint"}), ("model", {"num_experts": 10**9}),
        ("spec", {"classes": ["x"] * 10**5}), ("spec", {"shape": [float("inf"), 28, 28]}), ("spec", {"std": [0.0, 0.0, 0.0]}),
    ],
)  # fmt: skip
def test_a_huge_network_in_a_header_takes_no_memory(run: Path, tmp_path: Path, section: str, change: dict[str, Any]) -> None:
    """A small file that describes a huge network is refused before the network is built."""
    model = load(run)
    content = {"schema": 1, "config": to_dict(model.config), "spec": asdict(model.spec), "epoch": 1, "record": None}
    (content["config"] if section == "model" else content)[section] |= change
    save_tensors(model.network.state_dict(), tmp_path / "x.safetensors", {"advmoe": json.dumps(content)})
    assert peak(lambda: refusal(load, tmp_path / "x.safetensors"), torch.device("cpu")) < 200_000_000


@pytest.mark.parametrize("schema", [[1], "x" * 9000, {"a" * 9000: 1}, 10**400])
def test_schemas_of_another_kind_are_refused_in_few_words(run: Path, tmp_path: Path, schema: Any) -> None:
    save_tensors(load(run).network.state_dict(), tmp_path / "x.safetensors", {"advmoe": json.dumps({"schema": schema})})
    assert len(refusal(load, tmp_path / "x.safetensors")) < 400


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    assert refusal(load, tmp_path / "x.safetensors") == f"{tmp_path / 'x.safetensors'}: not a plain file"
