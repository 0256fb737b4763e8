"""Downloads from the hub, by a stand-in for its library, are read by the package's readers."""

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.data.hub import REPOSITORIES, fetch_from_hub
from advmoe.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Rows:
    """A stand-in for a data set of the library `datasets`: a table of columns."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def to_parquet(self, path: str) -> int:
        pyarrow.parquet.write_table(pa.table(self.columns), path)
        return 1


def rows(repository: str, split: str) -> Rows:
    label = {"uoft-cs/cifar10": "label", "uoft-cs/cifar100": "fine_label"}[repository]
    random, classes = np.random.default_rng(len(split)), {"label": 10, "fine_label": 100}[label]
    images = []
    for _ in range(2 * classes):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return Rows({"img": images, label: [*range(classes)] * 2, "coarse_label": [99] * 2 * classes})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A stand-in for `datasets`; returns the list of requests."""
    requests: list[tuple[str, str]] = []

    def load(repository: str, *, split: str) -> Rows:
        requests.append((repository, split))
        return rows(repository, split)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    return requests


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_download_from_the_hub_is_read(name: str, hub: list[tuple[str, str]], tmp_path: Path) -> None:
    fetch_from_hub(name, tmp_path / "data")
    assert hub == [(f"uoft-cs/{name}", "train"), (f"uoft-cs/{name}", "test")]
    assert names(tmp_path / "data") == ["test.parquet", "train.parquet"]
    splits = load_dataset(DataConfig(dataset=name, data_dir=str(tmp_path / "data")))
    classes = len(splits.spec.classes)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (classes, classes, 2 * classes)


def test_hub_files_that_exist_are_kept(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("mine")
    assert fetch_from_hub("cifar10", tmp_path) == [
        f"{tmp_path}/train.parquet: already exists",
        f"{tmp_path}/test.parquet: downloaded",
    ]
    assert hub == [("uoft-cs/cifar10", "test")]
    assert (tmp_path / "train.parquet").read_text() == "mine"


def test_hub_without_the_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("pip install 'advmoe[hub]'")):
        fetch_from_hub("cifar10", tmp_path / "data")
    assert names(tmp_path) == []


def test_hub_failure_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Rows:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    with pytest.raises(UserError, match=r"cannot read uoft-cs/cifar10 from the hub \(ConnectionError: Couldn't reach the hub"):
        fetch_from_hub("cifar10", tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet", "fashion-mnist"])
def test_other_data_sets_are_not_downloaded_from_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} is not downloaded from the hub; --from hub has cifar10 and cifar100"):
        fetch_from_hub(name, tmp_path)
