"""A sweep small enough for tests: two runs of seconds each."""

import json

import pytest

from advmoe.sweep.job import Job

PRESET = ("pgd_10",)


@pytest.fixture
def job(tiny, tmp_path):
    """job(name, **fields): a job on one thread of the CPU, below tmp_path."""

    def make(name="run", method="at_small_dense", **fields):
        settings = {"backbone": "vgg16_bn", "limit_train": 60, "limit_test": 10, "model_scale": 0.5, "tied_share": 0.0}
        return Job(tmp_path / name, tiny(method, **{**settings, "epochs": 1, **fields}), PRESET).at("cpu", 1)

    return make


@pytest.fixture
def write_sweep(tmp_path):
    """write_sweep(text): the name of a sweep file with this text."""

    def write(text):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def figures():
    """figures(run folder): the part of the Record that a second run of the same settings must reproduce."""

    def read(folder):
        record = json.loads((folder / "record.json").read_text())
        evaluation = record["evaluation"]
        attacks = {name: {**attack, "seconds": 0} for name, attack in evaluation["attacks"].items()}
        return {**{name: record[name] for name in ("sa", "ra", "epoch", "fingerprint", "seed")}, **evaluation, "attacks": attacks}

    return read
