"""`advmoe data get` and `advmoe data check`."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from refused_commands import refused

from advmoe.cli.main import main
from advmoe.data.fetch import OFFICIAL, Official


def cifar10() -> bytes:
    """A tiny cifar-10-python.tar.gz: 20 training images (2 of each class) and 15 for the test (class 0 to 4 twice)."""
    random, buffer = np.random.default_rng(0), io.BytesIO()
    labels = {f"data_batch_{number}": [2 * number - 2, 2 * number - 1] * 2 for number in range(1, 6)}
    labels["test_batch"] = [*range(10), *range(5)]
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, batch_labels in labels.items():
            data = random.integers(0, 256, (len(batch_labels), 3072), dtype=np.uint8)
            content = pickle.dumps({b"data": data, b"labels": batch_labels}, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = cifar10()


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ARCHIVE as the official archive on a server that cannot be reached."""
    md5 = hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(OFFICIAL, "cifar10", Official("http://127.0.0.1:9/cifar-10-python.tar.gz", md5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refused(capsys, "data", *arguments)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_group_lists_its_two_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["get", "check"]
    assert all(len(line.split()) > 5 for line in lines[2:])


def test_the_overview_lists_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "  data       Download a data set (get)" in capsys.readouterr().out


def test_get_verifies_what_is_there_and_check_reads_it(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "data/cifar10").mkdir(parents=True)
    (working_folder / "data/cifar10/cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    lines = run_command(capsys, "get", "cifar10").splitlines()
    assert "as published" in lines[0]
    assert lines[-1] == "next: advmoe data check --dataset cifar10 --data-dir data/cifar10"
    arguments = ("check", "--dataset", "cifar10", "--data-dir", "data/cifar10", "--validation-share", "0.5")
    result = json.loads(run_command(capsys, *arguments, "--json"))
    assert (result["name"], result["shape"], result["classes"]) == ("cifar10", [3, 32, 32], 10)
    assert result["parts"] == {
        "train": {"images": 10, "least_a_class": 1, "most_a_class": 1},
        "validation": {"images": 10, "least_a_class": 1, "most_a_class": 1},
        "test": {"images": 15, "least_a_class": 1, "most_a_class": 2},
    }
    assert run_command(capsys, *arguments).splitlines() == [
        "name         cifar10", f"fingerprint  {result['fingerprint']}", "images       3 x 32 x 32, 10 classes",
        "train        10, 1 a class", "validation   10, 1 a class", "test         15, 1 to 2 a class",
    ]  # fmt: skip


def test_check_takes_limits(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(run_command(capsys, "check", "--dataset", "fashion-mnist", "--limit-train", "40", "--json"))
    assert result["parts"]["train"] == {"images": 40, "least_a_class": 4, "most_a_class": 4}
    assert len(result["fingerprint"]) == 64


def test_no_network_says_which_file_goes_where(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_line(capsys, "get", "cifar10", "--to", "elsewhere")
    assert "cannot download http://127.0.0.1:9/cifar-10-python.tar.gz" in text
    assert text.endswith("save it as elsewhere/cifar-10-python.tar.gz\n")


def test_an_interrupt_says_how_to_continue(
    working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.data.fetch.urllib.request.urlopen", interrupted)
    assert main(["data", "get", "cifar10"]) == 130
    assert "the same command continues where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gte", "cifar10"], "unknown data command 'gte': did you mean get?"),
        (["get"], "NAME"),
        (["get", "cifar"], "unknown dataset to download 'cifar': did you mean cifar10"),
        (["get", "imagenet"], "imagenet cannot be downloaded without an account: register at"),
        (["get", "cifar10", "--from", "moon"], "--from"),
        (["get", "cifar10", "--too", "x"], "did you mean --to?"),
        (["get", "cifar10", "--to", __file__], "is a file; --to takes a folder"),
        (["get", "tinyimagenet", "--from", "hub"], "tinyimagenet is not downloaded from the hub"),
        (["check"], "cifar10 needs --data-dir"),
        (["check", "--dataset", "cifra10"], "unknown dataset 'cifra10': did you mean cifar10"),
        (["check", "--data-dir", "nowhere"], "nowhere: no such file"),
        (["check", "--limit-train", "0"], "limit_train must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], message: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(capsys, *arguments)
    assert list(working_folder.iterdir()) == []
