"""`advmoe data` as a person meets it."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from advmoe.cli.main import main
from advmoe.data.fetch import OFFICIAL, Official


def cifar10() -> bytes:
    """A tiny cifar-10-python.tar.gz: 20 training images (2 of each class) and 15 for the test (class 0 to 4 twice)."""
    random, buffer = np.random.default_rng(0), io.BytesIO()
    labels = {f"data_batch_{number}": [2 * number - 2, 2 * number - 1] * 2 for number in range(1, 6)}
    labels["test_batch"] = [*range(10), *range(5)]
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, own in labels.items():
            data = random.integers(0, 256, (len(own), 3072), dtype=np.uint8)
            content = pickle.dumps({b"data": data, b"labels": own}, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = cifar10()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the archive as the official one; its server cannot be reached."""
    md5 = hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(OFFICIAL, "cifar10", Official("http://127.0.0.1:9/cifar-10-python.tar.gz", md5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command prints."""
    assert main(["data", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_group_lists_its_two_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", *words])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["get", "check"]
    assert all(len(line.split()) > 5 for line in lines[2:])


def test_overview_has_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "  data       Download a data set (get)" in capsys.readouterr().out


def test_get_verifies_what_is_there_and_check_reads_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "data/cifar10").mkdir(parents=True)
    (place / "data/cifar10/cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    lines = printed(capsys, "get", "cifar10").splitlines()
    assert "as published" in lines[0]
    assert lines[-1] == "next: advmoe data check --dataset cifar10 --data-dir data/cifar10"
    words = ("check", "--dataset", "cifar10", "--data-dir", "data/cifar10", "--validation-share", "0.5")
    held = json.loads(printed(capsys, *words, "--json"))
    assert (held["name"], held["shape"], held["classes"]) == ("cifar10", [3, 32, 32], 10)
    assert held["parts"] == {
        "train": {"images": 10, "least_a_class": 1, "most_a_class": 1},
        "validation": {"images": 10, "least_a_class": 1, "most_a_class": 1},
        "test": {"images": 15, "least_a_class": 1, "most_a_class": 2},
    }
    assert printed(capsys, *words).splitlines() == [
        "name         cifar10", f"fingerprint  {held['fingerprint']}", "images       3 x 32 x 32, 10 classes",
        "train        10, 1 a class", "validation   10, 1 a class", "test         15, 1 to 2 a class",
    ]  # fmt: skip


def test_check_takes_limits(capsys: pytest.CaptureFixture[str]) -> None:
    held = json.loads(printed(capsys, "check", "--dataset", "fashion-mnist", "--limit-train", "40", "--json"))
    assert held["parts"]["train"] == {"images": 40, "least_a_class": 4, "most_a_class": 4}
    assert len(held["fingerprint"]) == 64


def test_no_network_says_which_file_goes_where(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "get", "cifar10", "--to", "elsewhere")
    assert "cannot download http://127.0.0.1:9/cifar-10-python.tar.gz" in text
    assert text.endswith("save it as elsewhere/cifar-10-python.tar.gz\n")


def test_interrupt_says_how_to_go_on(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.data.fetch.urllib.request.urlopen", stopped)
    assert main(["data", "get", "cifar10"]) == 130
    assert "the same command continues where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gte", "cifar10"], "unknown data command 'gte': did you mean get?"),
        (["get"], "NAME"),
        (["get", "cifar"], "unknown dataset to download 'cifar': did you mean cifar10"),
        (["get", "imagenet"], "imagenet cannot be downloaded without an account: register at"),
        (["get", "cifar10", "--from", "moon"], "--from"),
        (["get", "cifar10", "--too", "x"], "did you mean --to?"),
        (["get", "tinyimagenet", "--from", "hub"], "tinyimagenet is not downloaded from the hub"),
        (["check"], "cifar10 needs --data-dir"),
        (["check", "--dataset", "cifra10"], "unknown dataset 'cifra10': did you mean cifar10"),
        (["check", "--data-dir", "nowhere"], "nowhere: no such file"),
        (["check", "--limit-train", "0"], "limit_train must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *words)
    assert list(place.iterdir()) == []
