"""scripts/five_methods.py: slices that add up, at toy scale; real processes where nothing else will do."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from advmoe.config import dump_yaml
from advmoe.progress_state import read_run

SCRIPT = Path(__file__).parents[1] / "scripts" / "five_methods.py"
TOY = ["--dataset", "fashion-mnist", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TOY += ["--num-steps", "1", "--epochs", "2", "--device", "cpu", "--threads", "1"]
EVALUATE = ["--evaluate", "--attacks pgd_10 --device cpu --threads 1"]
# A stand-in for `advmoe`: it trains three epochs, the first in FIRST seconds, the others in LATER, says they took SAID, and
# writes each start to the file LOG.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
what, words = sys.argv[1], sys.argv[2:]
run = Path(words[words.index("--out") + 1] if what == "train" else words[0])
run.mkdir(parents=True, exist_ok=True)
with open(os.environ["LOG"], "a") as log:
    log.write(f"{run.name} {what}\\n")
if run.name == os.environ.get("FAILS"):
    sys.exit("advmoe: error: no such data")
if what == "train":
    (run / "config.yaml").write_text(os.environ["CONFIG"])
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for epoch in range(done + 1, 4):
        time.sleep(float(os.environ["FIRST" if epoch == 1 else "LATER"]))
        with metrics.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "train_seconds": float(os.environ["SAID"]), "validate_seconds": 0.0}) + "\\n")
else:
    (run / "record.json").write_text(json.dumps({"method": run.name, "sa": 50.0, "ra_worst": 20.0}))
"""


@pytest.fixture(scope="module")
def five():
    described = importlib.util.spec_from_file_location("five_methods", SCRIPT)
    module = importlib.util.module_from_spec(described)
    sys.modules["five_methods"] = module  # where dataclasses look their annotations up
    described.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(five, tiny, tmp_path, monkeypatch):
    """Make slices quick; stand_in(seconds of the first epoch, of the others, what it says of both, run that fails)."""
    (tmp_path / "advmoe.py").write_text(STAND_IN)
    monkeypatch.setattr(five, "ADVMOE", (sys.executable, str(tmp_path / "advmoe.py")))
    monkeypatch.setattr(five, "MARGIN", 0.0)
    monkeypatch.setattr(five, "POLL", 0.02)
    monkeypatch.setattr(five.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LOG", str(tmp_path / "log.txt"))
    monkeypatch.setenv("CONFIG", dump_yaml(tiny()))

    def setting(first=0.0, later=0.0, said=0.0, fails=""):
        for name, value in (("FIRST", first), ("LATER", later), ("SAID", said)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("FAILS", fails)

    return setting


def called(five, tmp_path, seconds, *words):
    place = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results/five.json")]
    return five.main(["--minutes", str(seconds / 60), *place, *words])


def log(tmp_path):
    return (tmp_path / "log.txt").read_text().splitlines()


def test_one_long_slice_does_all_five_and_writes_their_records(five, stand_in, tmp_path, capsys):
    stand_in()
    assert called(five, tmp_path, 300) == 0
    assert log(tmp_path) == [f"{method}-0 {what}" for method in five.METHODS for what in ("train", "evaluate")]
    records = json.loads((tmp_path / "results/five.json").read_text())
    assert [record["method"] for record in records] == [f"{method}-0" for method in five.METHODS]
    assert "advmoe-0: done, SA 50.0, RA-worst 20.0" in capsys.readouterr().out
    assert called(five, tmp_path, 300) == 0
    assert len(log(tmp_path)) == 10  # nothing is run twice


def test_training_stops_after_an_epoch_where_the_next_would_not_fit(five, stand_in, tmp_path, capsys):
    stand_in(later=250, said=1000)
    started = time.monotonic()
    assert called(five, tmp_path, 200, "--methods", "advmoe") == 75
    assert time.monotonic() - started < 100
    assert read_run(tmp_path / "runs/advmoe-0").epoch == 1
    assert "advmoe-0: left to train (1 of 3 epochs)" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    stand_in()
    assert called(five, tmp_path, 60, "--methods", "advmoe") == 0
    assert log(tmp_path) == ["advmoe-0 train", "advmoe-0 train", "advmoe-0 evaluate"]


def test_a_slice_that_is_too_short_for_anything_says_so(five, stand_in, tmp_path, capsys):
    stand_in(first=60)
    started = time.monotonic()
    assert called(five, tmp_path, 1.0, "--methods", "advmoe") == 1
    assert time.monotonic() - started < 10
    assert "give this more --minutes" in capsys.readouterr().out


def test_one_failure_is_told_and_the_rest_goes_on(five, stand_in, tmp_path, capsys):
    stand_in(fails="at_sparse-0")
    assert called(five, tmp_path, 300, "--methods", "at_sparse", "advmoe") == 1
    assert "failed: at_sparse-0: advmoe: error: no such data" in capsys.readouterr().out
    assert log(tmp_path) == ["at_sparse-0 train", "advmoe-0 train", "advmoe-0 evaluate"]
    stand_in()
    assert called(five, tmp_path, 300, "--methods", "at_sparse", "advmoe") == 0


def test_two_side_by_side(five, stand_in, tmp_path):
    stand_in(first=0.5)
    assert called(five, tmp_path, 300, "--methods", "at_moe", "advmoe", "--at-once", "2") == 0
    assert sorted(log(tmp_path)[:2]) == ["advmoe-0 train", "at_moe-0 train"]


def test_words_of_the_training(five):
    options = five.parsed(["--data-dir", "d", "--lr", "0.05", "--precision", "auto"])
    words = five.training_words(Path("runs/at_small_dense-3"), options)
    assert words == ["--recipe", "cifar10-resnet18-at_small_dense", "--dataset", "cifar10", "--seed", "3", "--data-dir", "d",
                     "--lr", "0.05", "--precision", "auto", "--out", "runs/at_small_dense-3", "--resume"]  # fmt: skip
    other = five.training_words(Path("runs/advmoe-0"), five.parsed(["--dataset", "cifar10-jpeg"]))
    assert other[:4] == ["--recipe", "cifar10-resnet18-advmoe", "--dataset", "cifar10-jpeg"]


def test_real_slices_add_up(five, tmp_path, monkeypatch, capsys):
    """The real command line, stopped at the first epoch's end, then run to the end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(five.signal, "signal", lambda *_: None)
    monkeypatch.setattr(five, "SLOWER", 1e9)
    words = [*TOY, *EVALUATE, "--methods", "advmoe"]
    assert called(five, tmp_path, 300, *words) == 75
    assert read_run(tmp_path / "runs/advmoe-0").epoch == 1
    monkeypatch.setattr(five, "SLOWER", 1.2)
    assert called(five, tmp_path, 300, *words) == 0
    (record,) = json.loads((tmp_path / "results/five.json").read_text())
    assert record["method"] == "advmoe"
    assert record["config"]["training"]["epochs"] == 2
