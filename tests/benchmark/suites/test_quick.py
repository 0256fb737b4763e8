"""Long suites in their `--quick` form."""

import subprocess

import pytest
import torch

from advmoe.benchmark.process import run_in_process
from advmoe.benchmark.setup import QUICK, Setup
from advmoe.benchmark.suites import SUITES, dispatch, precision, scaling, streaming
from advmoe.errors import UserError

SETUP = Setup(scale=QUICK, quick=True)


def test_dispatch_times_every_dispatch_in_every_phase(monkeypatch):
    monkeypatch.setattr(dispatch, "threshold_calls", lambda: {"0": lambda: None})
    rows = list(SUITES["dispatch"].measure(SETUP))
    assert {row.what for row in rows} == {"split", "wide", "grouped", "0"}
    assert len(rows) == 3 * 2 * 4 + 1


def test_a_threshold_holds_only_while_it_is_measured(monkeypatch):
    thresholds = []
    monkeypatch.setattr(dispatch.variants, "iteration", lambda *_: lambda: thresholds.append(dispatch.choice.GROUPED_UP_TO))
    usual = dispatch.choice.GROUPED_UP_TO
    for call in dispatch.threshold_calls().values():
        call()
    assert thresholds == list(dispatch.THRESHOLDS)
    assert usual == dispatch.choice.GROUPED_UP_TO


def test_losses_of_precisions_are_compared_epoch_by_epoch():
    losses = {"float32": [[2.0, 1.0], [4.0, 1.0]], "bfloat16": [[3.5, 1.0], [4.5, 1.5]]}
    rows = {row.name: row.value for row in precision.loss_rows(losses)}
    assert rows["demo, mean loss of epoch 1: float32"] == 3.0
    assert rows["demo, mean loss of epoch 1: gap between precisions"] == 1.0
    assert rows["demo, mean loss of epoch 1: deviation between seeds"] == pytest.approx((2**0.5 + 0.5**0.5) / 2)
    assert rows["demo, mean loss of epoch 2: bfloat16"] == 1.25


@pytest.mark.usefixtures("small_networks")
def test_precision_compares_losses_and_both_clocks(monkeypatch):
    monkeypatch.setattr(precision, "epoch_losses", lambda run, splits: [2.0 + run.seed * (run.runtime.precision == "bfloat16")])
    rows = {row.name: row for row in SUITES["precision"].measure(SETUP)}
    assert rows["demo, mean loss of epoch 1: gap between precisions"].value == 0.5
    for case in ("demo, processor time of a run", "iteration, ResNet-18, batch 6, wall time"):
        assert rows[f"{case}: float32 / bfloat16"].value > 0


def test_scaling_compares_processes_with_one(monkeypatch):
    seconds = {640: 6.4, 1280: 8.0}  # of one run
    monkeypatch.setattr(scaling, "seconds_of_second_epoch", lambda command, run: seconds[run.images])
    ratios = {row.name: (row.value, row.target) for row in SUITES["scaling"].measure(Setup()) if row.unit == "ratio"}
    case = "ResNet-18 of width 16, batch 64 a process"
    assert ratios[f"advmoe, {case}: 2 processes / 1 process"] == (1.6, ">= 1.6")
    assert ratios[f"advmoe, {case}: 2 processes, --no-sync-norm / 1 process"] == (1.6, None)
    assert ratios[f"advmoe, {case}: 2 separate runs / 1 process"] == (2.0, None)
    assert ratios[f"at_dense, {case}: 2 processes / 1 process"] == (1.6, None)


@pytest.mark.parametrize("suite", ["scaling", "waiting"])
def test_runs_train_on_the_chosen_device(suite, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="advmoe: enough")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    with pytest.raises(UserError, match=r"ended with status 1 \(advmoe: enough\)"):
        list(SUITES[suite].measure(Setup(torch.device("cuda:1"), quick=True)))
    assert " --device cuda:1 " in " ".join(map(str, commands[0]))


def test_one_epoch_of_streamed_images(tmp_path):
    streaming.make_folder(tmp_path, 30, 5)
    assert len({path.stat().st_ino for path in tmp_path.rglob("*.JPEG")}) == 5
    (epoch,) = run_in_process(streaming.run_epoch, streaming.EpochTask(folder=str(tmp_path)), streaming.Epoch)
    assert epoch.images == len(list((tmp_path / "train").rglob("*.JPEG"))) - 10  # one of each class is held out
    assert 2**26 < epoch.pss <= epoch.rss
    rows = list(streaming.decoding(tmp_path, SETUP))
    assert {row.what for row in rows} >= {"plain", "streamed, 1 worker", "streamed, 2 workers / plain"}


def test_crops_shrunk_while_decoding_are_close_to_full_ones():
    rows = {row.what: row for row in streaming.crop_rows(Setup(scale=QUICK, quick=True))}
    assert rows["shrunk while decoding / full decoding"].value > 0
    assert 0 <= rows["share shrunk"].value <= 100
