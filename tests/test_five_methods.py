"""scripts/five_methods.py: slices that add up, at toy scale; real processes where nothing else will do."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from advmoe.attacks.presets import PRESETS
from advmoe.config import dump_yaml
from advmoe.runs.status import read_run

SCRIPT = Path(__file__).parents[1] / "scripts" / "five_methods.py"
TOY = ["--dataset", "fashion-mnist", "--width", "4", "--limit-train", "40", "--limit-test", "10", "--batch-size", "20"]
TOY += ["--num-steps", "1", "--device", "cpu", "--threads", "1"]
EPOCHS = ["--epochs", "3"]
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
    (run / "config.yaml").write_text((Path(os.environ["CONFIGS"]) / run.name).read_text())
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for epoch in range(done + 1, 7 if run.name.startswith("at_sparse") else 4):
        time.sleep(float(os.environ["FIRST" if epoch == 1 else "LATER"]))
        with metrics.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "train_seconds": float(os.environ["SAID"]), "validate_seconds": 0.0}) + "\\n")
else:
    record = {"method": run.name, "sa": 50.0, "ra_worst": 20.0, "norm": "Linf", "attack_seed": 0, "epsilon": 8 / 255}
    record["config"] = {"attack": {"epsilon": 8 / 255}, "data": {"limit_test": None}}
    attacks = ["pgd_10"] if "--attacks" in words else os.environ["STANDARD" if "--standard" in words else "QUICK"].split()
    record["evaluation"] = {"attacks": dict.fromkeys(attacks), "left_out": {}}
    (run / "record.json").write_text(json.dumps(record))
"""


@pytest.fixture(scope="module")
def five():
    described = importlib.util.spec_from_file_location("five_methods", SCRIPT)
    module = importlib.util.module_from_spec(described)
    sys.modules["five_methods"] = module  # where dataclasses look their annotations up
    described.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(five, tmp_path, monkeypatch):
    """Make slices quick; stand_in(seconds of the first epoch, of the others, what it says of both, run that fails)."""
    (tmp_path / "advmoe.py").write_text(STAND_IN)
    monkeypatch.setattr(five, "ADVMOE", (sys.executable, str(tmp_path / "advmoe.py")))
    monkeypatch.setattr(five, "MARGIN", 0.0)
    monkeypatch.setattr(five, "POLL", 0.02)
    monkeypatch.setattr(five.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LOG", str(tmp_path / "log.txt"))
    monkeypatch.setenv("CONFIGS", str(tmp_path / "configs"))
    (tmp_path / "configs").mkdir()
    for preset in ("quick", "standard"):
        monkeypatch.setenv(preset.upper(), " ".join(PRESETS[preset].attacks))
    for method in five.METHODS:
        config = five.trained_so(tmp_path / f"{method}-0", five.parsed(EPOCHS))
        (tmp_path / "configs" / f"{method}-0").write_text(dump_yaml(config))

    def setting(first=0.0, later=0.0, said=0.0, fails=""):
        for name, value in (("FIRST", first), ("LATER", later), ("SAID", said)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("FAILS", fails)

    return setting


def called(five, tmp_path, seconds, *words):
    place = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results/five.json")]
    return five.main(["--minutes", str(seconds / 60), *place, *EPOCHS, *words])


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


def test_another_preset_evaluates_again_and_copies_no_other_records(five, stand_in, tmp_path):
    stand_in()
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    assert called(five, tmp_path, 300, "--methods", "advmoe", "--evaluate", "--standard") == 0
    assert log(tmp_path) == ["advmoe-0 train", "advmoe-0 evaluate", "advmoe-0 evaluate"]
    (record,) = json.loads((tmp_path / "results/five.json").read_text())
    assert list(record["evaluation"]["attacks"]) == PRESETS["standard"].attacks
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    (record,) = json.loads((tmp_path / "results/five.json").read_text())
    assert list(record["evaluation"]["attacks"]) == PRESETS["quick"].attacks


@pytest.mark.parametrize("other", ["--epsilon 4/255", "--limit-test 7", "--seed 1", "--norm L2 --epsilon 0.5"])
def test_a_record_of_another_threat_is_not_the_one_asked_for(five, stand_in, tmp_path, other):
    stand_in()
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    assert five.left(tmp_path / "runs/advmoe-0", five.parsed([]).wanted) == ""
    assert five.left(tmp_path / "runs/advmoe-0", five.parsed(["--evaluate", other]).wanted) == "evaluate"


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"evaluation": {"attacks": {}, "left_out": {}}}'])
def test_a_file_that_is_no_record_is_not_a_run_that_is_done(five, stand_in, tmp_path, content):
    stand_in()
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    (tmp_path / "runs/advmoe-0/record.json").write_text(content)
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    assert log(tmp_path)[2:] == ["advmoe-0 evaluate"]


def test_other_settings_of_a_finished_run_are_refused(five, stand_in, tmp_path, capsys):
    stand_in()
    assert called(five, tmp_path, 300, "--methods", "advmoe") == 0
    assert called(five, tmp_path, 300, "--methods", "advmoe", "--epochs", "9") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "advmoe-0: holds another run (training.epochs: 3, not 9); give another --runs" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "--seeds must be from 1 to 1000, not 0"),
        (["--seeds", "1001"], "--seeds must be from 1 to 1000, not 1001"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'"),
        (["--minutes", "nan"], "--minutes must be positive and finite, not nan"),
        (["--minutes", "-1"], "--minutes must be positive and finite, not -1.0"),
        (["--at-once", "0"], "--at-once must be at least 1, not 0"),
        (["--methods", "at_all"], "argument --methods: invalid choice: 'at_all'"),
        (["--evaluate", "--quik"], "--quik"),
        (["--evaluate", "--attacks pgd_11"], "unknown attack 'pgd_11'"),
        (["--evaluate", "--fresh"], "--evaluate: --fresh and --part are nothing for slices"),
        (["--limit-trian", "3"], "--limit-trian"),
    ],
)
def test_wrong_words_are_one_line_and_leave_the_results(five, stand_in, tmp_path, capsys, words, said):
    results = tmp_path / "results/five.json"
    results.parent.mkdir()
    results.write_text("kept")
    assert called(five, tmp_path, 300, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("five_methods: error: ")
    assert said in line
    assert results.read_text() == "kept"
    assert not (tmp_path / "runs").exists()


def test_a_shard_that_is_cut_short_counts_nothing(five, tmp_path):
    store = tmp_path / "advmoe-0/evaluation"
    store.mkdir(parents=True)
    (store / "shard-00000.json").write_text('{"attacks": {"pgd_10": {}}}')
    (store / "shard-00001.json").write_text('{"attacks": {"pgd_1')
    (store / "checks.json").write_text("")
    assert five.reached(tmp_path / "advmoe-0") == (0, 2)


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
    assert record["config"]["training"]["epochs"] == 3
