"""Fixtures that several rooms share."""

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as `advmoe` does

import numpy as np
import pytest
import small_backbone
import torch
from recorder import Recorder
from small_python import QUICK_SNAPSHOT

from advmoe.attacks.registry import ATTACKS
from advmoe.config import AttackConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.data import DATASETS, Splits, load_dataset
from advmoe.models import MODELS
from advmoe.moe import GATES
from advmoe.training.losses import LOSSES
from advmoe.training.methods import METHODS

SEED = 4321  # not one that tests use themselves: then two networks that must differ would be equal
THREADS = torch.get_num_threads()


def pytest_configure() -> None:
    """The terminal or CI service that runs the tests decides neither widths nor colours, and its proxy is not for their servers."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # read by rich
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm"
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{others},127.0.0.1" if others else "127.0.0.1"


def pytest_runtest_setup() -> None:
    """A test finds the same random numbers and number of threads, whichever tests ran before it."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def register_small_backbone() -> None:
    """Register it after collection, so that tests of every backbone are parametrised with those of the package alone."""
    small_backbone.register()


@pytest.fixture(scope="session", autouse=True)
def quick_snapshot() -> Iterator[None]:
    """Fewer attacks for the gallery and the curve of a Record. test_snapshot.py tests them as they are."""
    with patch.multiple("advmoe.evaluation.snapshot", **QUICK_SNAPSHOT):
        yield


@pytest.fixture(scope="module")
def small_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Python processes that the module's tests start know the small backbone and take a quick snapshot (see small_python.py)."""
    executable = tmp_path_factory.mktemp("small_python") / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("small_python.py")}" "$0" "$@"\n')
    executable.chmod(0o755)
    with patch.object(sys, "executable", str(executable)):
        yield


@pytest.fixture
def registries() -> Iterator[None]:
    """Entries that the test adds to a registry are removed after it."""
    with patch.dict(DATASETS), patch.dict(MODELS), patch.dict(METHODS), patch.dict(ATTACKS), patch.dict(GATES), patch.dict(LOSSES):
        yield


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the queries of AutoAttack's Square, and a fifth of the iterations of its other attacks."""
    from pyautoattack import AutoAttack

    set_version = AutoAttack._set_version

    def shortened(suite: AutoAttack, version: str = "standard") -> None:
        set_version(suite, version)
        assert suite.square.n_queries == 5000
        suite.square.n_queries = 500
        for attack in (suite.apgd, suite.apgd_targeted, suite.fab):
            assert attack.n_iter == 100
            attack.n_iter = 20

    monkeypatch.setattr(AutoAttack, "_set_version", shortened)


@pytest.fixture
def quick_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """`advmoe attack` with one attack and a coarse bisection. test_fooling.py and test_attack_command.py test its attacks."""
    monkeypatch.setattr("advmoe.cli.attack.THOROUGH", ("pgd_10",))
    monkeypatch.setattr("advmoe.evaluation.fooling.QUICK", ("pgd_10",))
    monkeypatch.setattr("advmoe.evaluation.fooling.CLOSE", 0.5)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    observer, handler = Recorder(), logging.Handler(logging.WARNING)
    handler.emit = lambda record: observer.notes.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("advmoe")
    log.addHandler(handler)
    yield observer
    log.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RunConfig]:
    """tiny(method, **fields): a run of less than a second on embedded images; any field of any section can be set."""

    def make(method: str = "advmoe", **fields: Any) -> RunConfig:
        config = RunConfig(
            method=method, model=ModelConfig(backbone=small_backbone.SMALL, width=4),
            data=DataConfig(dataset="fashion-mnist", limit_train=60, limit_test=20),
            attack=AttackConfig(epsilon=0.1, num_steps=1), training=TrainingConfig(epochs=3, batch_size=20, tied_share=0.34),
        )  # fmt: skip
        for section in ("model", "data", "attack", "training", "runtime"):
            settings = {name: fields.pop(name) for name in list(fields) if hasattr(getattr(config, section), name)}
            config = config.replace(**{section: getattr(config, section).replace(**settings)})
        return config.replace(**fields)

    return make


@pytest.fixture(scope="session")
def splits(tiny: Callable[..., RunConfig]) -> Splits:
    """The embedded images of the tiny runs. The test images also serve as validation images, because they are few."""
    loaded = load_dataset(tiny().data)
    return Splits(loaded.name, loaded.spec, loaded.fingerprint, loaded.train, loaded.test, loaded.test)
