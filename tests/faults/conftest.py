"""Fixtures for runs with injected faults; results go to the file that FAULTS_REPORT names (make test-faults)."""

import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SEED, trained
from filelock import FileLock
from row_report import Row, RowReport, versions

from advmoe.config import RunConfig, dump_yaml
from advmoe.files import write_atomically
from advmoe.training.methods import METHODS

LIBRARIES = ("torch", "numpy", "safetensors", "filelock")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RowReport("faults", content))


def content(rows: list[Row]) -> Row:
    totals: dict[tuple[str, str], Row] = {}
    for row in rows:
        total = totals.setdefault((row["fault"], row["method"]), {**row, "tried": 0, "survived": 0})
        total["tried"], total["survived"] = total["tried"] + row["tried"], total["survived"] + row["survived"]
    faults = sorted(totals.values(), key=lambda row: (row["fault"], list(METHODS).index(row["method"])))
    return {"seed": SEED, "versions": versions(LIBRARIES), "faults": faults}


@pytest.fixture(autouse=True, scope="session")
def default_signals() -> None:
    """Handle signals by default: a shell lets background processes ignore Ctrl-C, and their children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, str], Row]:
    """tally(fault, method): the row of the report that counts this fault and method."""

    def begin(fault: str, method: str) -> Row:
        row = {"fault": fault, "method": method, "tried": 0, "survived": 0}
        request.node.user_properties.append(("faults", row))
        return row

    return begin


@pytest.fixture
def tried(tally: Callable[[str, str], Row]) -> Callable[[str, str], Any]:
    """`with tried(fault, method):` counts an injected fault, and counts it as survived if the block raises nothing."""

    @contextmanager
    def once(fault: str, method: str) -> Iterator[None]:
        row = tally(fault, method)
        row["tried"] = 1
        yield
        row["survived"] = 1

    return once


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all worker processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_file(tiny: Callable[..., RunConfig], shared: Path) -> Callable[..., Path]:
    """tiny_file(method, **fields): a file with the smallest run of a method."""

    def write(method: str, **fields: Any) -> Path:
        config = tiny(method, backbone="resnet18", epochs=2, device="cpu", threads=1, **fields)
        text = dump_yaml(config)
        path = shared / f"{method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
        write_atomically(path, text)
        return path

    return write


@pytest.fixture(scope="session")
def unbroken(tiny_file: Callable[..., Path], shared: Path) -> Callable[[str], Path]:
    """unbroken(method): the folder of its smallest run, trained without a fault, once for all worker processes; only read it."""

    def make(method: str) -> Path:
        run = shared / f"unbroken-{method}"
        with FileLock(shared / f".{method}.lock"):
            if not (shared / f"{method}.done").exists():
                trained("train", "--config", tiny_file(method), "--out", run)
                (shared / f"{method}.done").touch()
        return run

    return make


@pytest.fixture
def arguments_of(tiny_file: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str | Path]]:
    """arguments_of(method): start or resume its smallest run in tmp_path/run."""

    def make(method: str, **fields: Any) -> list[str | Path]:
        return ["train", "--config", tiny_file(method, **fields), "--out", tmp_path / "run", "--resume"]

    return make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder that `arguments_of` trains in."""
    return tmp_path / "run"
