"""The Slurm placement, tested with submitit's local executor instead of a cluster."""

import time

import pytest

from advmoe.errors import UserError
from advmoe.runs.status import read_run
from advmoe.sweep.job import start, stop
from advmoe.sweep.placements import Request
from advmoe.sweep.schedule import drive

pytest.importorskip("submitit", reason="needs the extra slurm")
from advmoe.sweep.placements.slurm import SlurmPlacement, parsed  # needs the extra

pytestmark = pytest.mark.extra


def request(address, out, parameters=()):
    return Request(2, out, None, 1, "cpu", address, parameters)


@pytest.mark.slow
def test_jobs_give_the_records_of_plain_ones(job, figures, tmp_path):
    plain = job("plain")
    process = start(plain)
    assert process.wait() == 0
    stop([process])
    jobs = [job("good"), job("failing", "advmoe", batch_size=40)]
    placement = SlurmPlacement(request("local", tmp_path, ["timeout_min=10"]))
    failed = drive(placement, jobs, lambda: None).failed
    placement.close()
    assert failed == {"failing": "batch_size must be at most half of the 60 training images for two levels, not 40"}
    assert figures(jobs[0].folder) == figures(plain.folder)
    assert list((tmp_path / "submitit").glob("*submitted.pkl"))


@pytest.mark.slow
def test_closing_cancels_running_jobs(job, tmp_path):
    endless = job("endless", epochs=5000)
    placement = SlurmPlacement(request("local", tmp_path))
    placement.submit([endless])
    while read_run(endless.folder).epoch < 1:
        time.sleep(0.05)
    placement.close()
    time.sleep(2)
    epoch = read_run(endless.folder).epoch
    time.sleep(3)
    assert read_run(endless.folder).epoch == epoch


def test_values_of_parameters_are_json_or_else_text():
    """YAML reads 24:00:00 as 86400, which Slurm takes as minutes."""
    values = {"4": 4, "1.5": 1.5, "true": True, '{"exclude": "n1"}': {"exclude": "n1"}}
    texts = ["24:00:00", "1-12", "007", "[rack1|rack2]", "@x", "a=b", "yes", "[" * 5000]
    for text, value in (values | {text: text for text in texts}).items():
        assert parsed([f"slurm_time={text}"]) == {"slurm_time": value}


def test_jobs_run_in_process_by_the_debug_executor(job, tmp_path, capsys):
    refused = job("refused")
    refused.folder.mkdir()
    (refused.folder / "thesis.tex").write_text("mine")
    placement = SlurmPlacement(request("debug", tmp_path))
    failed = drive(placement, [refused], lambda: None).failed
    assert list(failed) == ["refused"]
    assert "is neither an empty folder nor the folder of a run" in failed["refused"]


@pytest.mark.parametrize(
    ("executor", "parameters", "message"),
    [
        ("local", ["gpus"], "--slurm: 'gpus' is not KEY=VALUE"),
        ("local", ["timeout_minutes=5"], "submitit: .*timeout_minutes"),
        ("local", ["a=b"], "--slurm: submitit: Parameter 'a' need"),
        ("local", ["timeout_min=long"], '--slurm: submitit: Parameter "timeout_min" expected type'),
        ("slurmm", [], "submitit has no executor 'slurmm': did you mean slurm"),
    ],
)
def test_bad_parameters_are_one_line(tmp_path, executor, parameters, message):
    with pytest.raises(UserError, match=message):
        SlurmPlacement.check(request(executor, tmp_path, parameters))
    with pytest.raises(UserError, match=message):
        SlurmPlacement(request(executor, tmp_path, parameters))


def test_valid_parameters_are_accepted_without_a_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    SlurmPlacement.check(request(None, tmp_path, ["slurm_partition=gpu", "gpus_per_node=1", "timeout_min=600"]))
    assert not list(tmp_path.iterdir())


def test_no_slurm_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="submitit: "):
        SlurmPlacement(request(None, tmp_path))
