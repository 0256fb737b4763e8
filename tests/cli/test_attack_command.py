"""`advmoe attack`: its report, the search for the smallest change, and the file that it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_backbone import ROUTED

from advmoe.cli.main import main
from advmoe.evaluation.fooling import Fooled, Victim, in_eight_bits
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.manifest import Progress
from advmoe.training.start import network


@pytest.fixture(scope="module")
def run(tiny: Any, splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recorder import Recorder

    path = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(epochs=1, tied_share=0.0), splits, path, Recorder())
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short attacks: each works on one image, and the long ones take minutes on a busy machine."""
    monkeypatch.setattr("advmoe.cli.attack.THOROUGH", ("pgd_20", "straight_through_1"))
    monkeypatch.setattr("advmoe.evaluation.fooling.QUICK", ("pgd_10",))
    monkeypatch.setattr("advmoe.evaluation.fooling.CLOSE", 0.3)


@pytest.fixture
def image(tmp_path: Path, splits: Any) -> Path:
    Image.fromarray(splits.test.raw[0, 0].numpy()).save(tmp_path / "boot.png")
    return tmp_path / "boot.png"


def run_attack(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["attack", *map(str, arguments), "--device", "cpu"]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def predictions(capsys: pytest.CaptureFixture[str], run: Path, *images: Path) -> list[dict[str, Any]]:
    """What `advmoe predict` says of the files."""
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, images), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def classes(capsys: pytest.CaptureFixture[str], run: Path, *images: Path) -> list[str]:
    return [row["class"] for row in predictions(capsys, run, *images)]


def test_written_image_is_in_the_ball_and_fools_when_read_back(run: Path, image: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "adversarial.png"
    report = json.loads(run_attack(capsys, run, image, "--epsilon", "64/255", "--out", out, "--json")[0])
    clean, adversarial = classes(capsys, run, image, out)
    assert clean == report["clean"]["class"] == report["label"]
    assert adversarial != clean
    change = np.asarray(Image.open(out)).astype(int) - np.asarray(Image.open(image)).astype(int)
    assert 0 < np.abs(change).max() <= 64
    first = report["tried"][0]
    assert (first["attack"], first["epsilon"]) == ("pgd_20", pytest.approx(64 / 255))
    assert first["fooled"] == (report["first"]["attack"] == "pgd_20")
    assert 0 < report["smallest"]["epsilon"] <= report["first"]["epsilon"] <= 64 / 255 + 1e-6
    assert report["file_epsilon"] == pytest.approx(np.abs(change).max() / 255, abs=1e-6)
    assert report["file_epsilon"] <= report["smallest"]["epsilon"] + 1 / 255
    (read_back,) = predictions(capsys, run, out)
    assert report["adversarial"]["pathway"] == read_back["pathway"]
    assert report["adversarial"]["confidence"] == pytest.approx(read_back["confidence"], abs=1e-6)
    assert len(report["clean"]["pathway"]) == len(report["adversarial"]["pathway"]) == ROUTED


def test_the_lines_without_json(run: Path, image: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = run_attack(capsys, run, image, "--epsilon", "64/255")
    for part in ("predicted", "Fooled first by", "Smallest change", f"of {ROUTED} choices", "Written: boot-adversarial.png"):
        assert part in out
    (read_back,) = predictions(capsys, run, Path("boot-adversarial.png"))
    assert f"The network takes it for {read_back['class']}, confidence {read_back['confidence']:.4f}, pathway" in out
    assert "at 64/255: fooled" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boot-adversarial.png", "boot.png"]


@pytest.mark.parametrize("suffix", ["npy", "NPY"])
def test_floats_are_the_unrounded_attack(run: Path, image: Path, tmp_path: Path, capsys: Any, suffix: str) -> None:
    out = tmp_path / f"adversarial.{suffix}"
    report = json.loads(run_attack(capsys, run, image, "--epsilon", "64/255", "--out", out, "--json")[0])
    assert (report["file"], report["file_epsilon"]) == (str(out), report["smallest"]["epsilon"])
    array = np.load(out)
    assert (array.dtype, array.shape) == (np.float32, (1, 28, 28))
    clean = np.asarray(Image.open(image)).astype(np.float32) / 255
    assert np.abs(array - clean).max() == pytest.approx(report["smallest"]["epsilon"], abs=1e-7)
    assert classes(capsys, run, out) == [report["adversarial"]["class"]]


def test_if_the_smallest_change_does_not_fool_in_eight_bits_the_first_one_is_written(
    run: Path, image: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[float] = []

    def only_the_second(victim: Victim, fooled: Fooled, epsilon: float) -> torch.Tensor | None:
        rounded.append(fooled.epsilon)
        return in_eight_bits(victim, fooled, epsilon) if len(rounded) == 2 else None

    monkeypatch.setattr("advmoe.cli.attack.in_eight_bits", only_the_second)
    out = tmp_path / "a.png"
    report = json.loads(run_attack(capsys, run, image, "--epsilon", "64/255", "--out", out, "--json")[0])
    assert rounded == [report["smallest"]["epsilon"], report["first"]["epsilon"]]
    assert report["file"] == str(out)
    assert classes(capsys, run, out) == [report["adversarial"]["class"]] != [report["clean"]["class"]]


def test_an_image_that_eight_bits_cannot_hold_is_written_as_floats(
    run: Path, image: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmoe.cli.attack.in_eight_bits", lambda *_: None)
    out = tmp_path / "a.png"
    assert f"Written: {tmp_path / 'a.npy'} (floats" in run_attack(capsys, run, image, "--epsilon", "64/255", "--out", out)[0]
    assert not out.exists()
    before, after = classes(capsys, run, image, tmp_path / "a.npy")
    assert before != after


@pytest.mark.parametrize(("name", "out"), [("a.png", "a.png"), ("a.npy", "a.png"), ("a.npy", "link/a.npy")])
def test_the_users_image_is_never_replaced(run: Path, tmp_path: Path, capsys: Any, name: str, out: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path)
    _, err = run_attack(capsys, run, tmp_path / name, "--out", tmp_path / out, status=2)
    assert f": the adversarial image could replace {tmp_path / name}; give another name" in err
    assert (tmp_path / name).read_bytes() == b"mine"


def test_an_image_that_is_a_link_to_itself_is_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    _, err = run_attack(capsys, run, tmp_path / "loop.png", "--out", tmp_path / "out.png", status=2)
    assert err.count("\n") == 1


def test_an_image_that_is_already_misclassified_is_not_attacked(
    run: Path, image: Path, tmp_path: Path, capsys: Any, splits: Any
) -> None:
    (predicted,) = classes(capsys, run, image)
    other = next(name for name in splits.spec.classes if name != predicted)
    out, err = run_attack(capsys, run, image, "--label", other, "--out", tmp_path / "a.png")
    assert f"Its label is {other}: the network is wrong on it without any change" in out
    assert err == ""
    assert not (tmp_path / "a.png").exists()


def test_epsilons_above_the_requested_one_are_searched(run: Path, image: Path, tmp_path: Path, capsys: Any) -> None:
    report = json.loads(run_attack(capsys, run, image, "--epsilon", "0.01/255", "--out", tmp_path / "a.png", "--json")[0])
    assert report["tried"][0]["fooled"] is False
    assert report["first"]["epsilon"] > report["epsilon"]
    assert classes(capsys, run, Path(report["file"])) != [report["clean"]["class"]]


def test_a_network_that_nothing_fools(tiny: Any, splits: Any, image: Path, tmp_path: Path, capsys: Any) -> None:
    config, folder = tiny("at_dense"), RunFolder(tmp_path / "stubborn")
    folder.claim(config, resume=False)
    model = network(config, splits.spec)
    with torch.no_grad():
        model.classifier.bias[3] += 1e4
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(model.state_dict(), {}, Progress([row]), "f" * 64, splits.spec)
    out, _ = run_attack(capsys, folder.path, image, "--epsilon", "0.9", "--out", tmp_path / "a.png")
    assert "No attack that was tried fools the network, at any epsilon up to 1." in out
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "0"], "epsilon must be in (0, 1], not 0"),
        (["--epsilon", "8/0"], "--epsilon"),
        (["--label", "T-shirtt"], "unknown label 'T-shirtt': did you mean T-shirt"),
        (["--out", "a.jpg"], "a.jpg: the adversarial image is written without loss: give a name that ends in .png or .npy"),
        (["--out", "nowhere/a.png"], "nowhere: no such folder for the adversarial image"),
        (["--seed", "-1"], "seed must be in [0, 2**63), not -1"),
    ],
)
def test_bad_input_is_one_line(run: Path, image: Path, arguments: list[str], message: str, capsys: Any) -> None:
    out, err = run_attack(capsys, run, image, *arguments, status=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# The network is never replaced


def test_the_image_is_no_file_of_the_run(run: Path, image: Path, tmp_path: Path, capsys: Any) -> None:
    network = tmp_path / "network.npy"  # a saved network may have any name
    network.write_bytes(b"mine")
    _, err = run_attack(capsys, network, image, "--out", network, status=2)
    assert f"{network}: the adversarial image could replace {network}; give another name" in err
    assert network.read_bytes() == b"mine"
