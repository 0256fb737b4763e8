"""`advmoe watch`: the state of each run, and the table that shows it."""

import io
import json
import os
import re
import time

import pytest
from records import content, quick, record
from rich.console import Console

from advmoe.cli import watch
from advmoe.cli.parsing import read
from advmoe.cli.streams import console
from advmoe.cli.watch import sparkline, statuses, watch_view
from advmoe.config import dump_yaml
from advmoe.errors import UserError
from advmoe.runs.failure import FailureRecorder, mark_failed
from advmoe.runs.status import FIRST_EPOCH, PATIENCE, SLOWER, read_run

RECORD = content(sa=61.2, ra_worst=23.4)
QUICK = quick(record(sa=50.0, ra_worst=..., ra_worst_quick=30.0)).to_json()
LABELS = ("method", "dataset", "loss", "least load", "it/s", "changed", "test SA")


def row(epoch, **fields):
    return {
        "epoch": epoch, "phase": 1, "loss": 2.125, "val_sa": 40.0 + epoch, "val_ra": 10.0 * epoch, "train_seconds": 10.0,
        "validate_seconds": 2.0, "iterations": 25, "load": [[0.5, 0.5], [0.93, 0.07]], **fields,
    }  # fmt: skip


@pytest.fixture
def make(tiny, tmp_path):
    """make(name, epochs done, record, shards, seconds since its last write): a run of three epochs."""

    def write(name, done=0, *, record=None, shards=(), silent=0.0, method="advmoe", seconds=12.0):
        run = tmp_path / name
        (run / "evaluation").mkdir(parents=True)
        (run / "config.yaml").write_text(dump_yaml(tiny(method)))
        rows = [row(epoch, train_seconds=seconds - 2.0) for epoch in range(1, done + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
        for number, attack in enumerate(shards):
            content = {"rows": [0], "attacks": {"pgd_10": {"seconds": attack}}}
            (run / f"evaluation/shard-{number:05d}.json").write_text(json.dumps(content))
        if record is not None:
            (run / "record.json").write_text(json.dumps(record))
        when = time.time() - silent
        for file in run.rglob("*"):
            os.utime(file, (when, when))
        return run

    return write


def touch(file, seconds_ago):
    os.utime(file, (time.time() - seconds_ago,) * 2)


def end(run, error, begun):
    """End training with an error, after the folder was claimed (begun) or before."""
    with FailureRecorder(run) as outcome:
        if begun:
            outcome.begin()
        raise error


def view(root, width=240, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(watch_view(statuses(root), root, console))
    return console.file.getvalue()


# States


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({}, "training"),
        ({"silent": FIRST_EPOCH - 60}, "training"),
        ({"silent": FIRST_EPOCH + 60}, "stalled"),
        ({"done": 2, "silent": PATIENCE - 60}, "training"),
        ({"done": 2, "silent": PATIENCE + 60}, "stalled"),
        ({"done": 2, "seconds": 1000.0, "silent": SLOWER * 1000 - 60}, "training"),
        ({"done": 2, "seconds": 1000.0, "silent": SLOWER * 1000 + 60}, "stalled"),
        ({"done": 3}, "trained"),
        ({"done": 3, "silent": 1e6}, "trained"),
        ({"done": 3, "method": "at_sparse"}, "training"),
        ({"done": 6, "method": "at_sparse"}, "trained"),
        ({"done": 3, "shards": (5.0,)}, "evaluating"),
        ({"done": 3, "shards": (5.0,), "silent": PATIENCE + 60}, "stalled"),
        ({"done": 3, "shards": (5.0, 500.0), "silent": PATIENCE + 60}, "evaluating"),
        ({"done": 3, "shards": (5.0,), "record": RECORD}, "done"),
        ({"done": 3, "shards": (5.0,), "record": RECORD, "silent": 1e6}, "done"),
    ],
)
def test_state(settings, state, make):
    assert read_run(make("run", **settings)).state == state


def test_shards_newer_than_the_record_are_a_new_evaluation(make):
    run = make("run", 3, shards=(5.0, 5.0), record=RECORD)
    touch(run / "record.json", 30)
    assert read_run(run).state == "evaluating"
    for file in run.rglob("shard-*"):
        touch(file, PATIENCE + 60)
    touch(run / "record.json", PATIENCE + 90)
    for name in ("config.yaml", "metrics.jsonl"):
        touch(run / name, PATIENCE + 120)
    assert read_run(run).state == "done"  # the newer evaluation has stalled; the Record remains


def test_any_file_of_the_run_is_a_sign_of_life(make):
    run = make("run", 1, silent=PATIENCE + 60)
    assert read_run(run).state == "stalled"
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events").write_text("")
    assert read_run(run).state == "training"
    assert read_run(run).age < 60


def test_a_run_has_failed_until_training_continues(make):
    run = make("run", 1)
    with pytest.raises(UserError):
        end(run, UserError("epoch 2: loss is not finite"), begun=True)
    assert (read_run(run).state, read_run(run).reason) == ("failed", "epoch 2: loss is not finite")
    assert "run: epoch 2: loss is not finite" in view(run)
    with FailureRecorder(run) as outcome:
        outcome.begin()
        assert read_run(run).state == "training"


def test_refused_and_interrupted_runs_have_not_failed(make):
    run = make("run", 1)
    with pytest.raises(UserError):
        end(run, UserError("holds this run unfinished"), begun=False)
    with pytest.raises(KeyboardInterrupt):
        end(run, KeyboardInterrupt(), begun=True)
    assert read_run(run).state == "training"


def test_the_newer_of_record_and_failure_counts(make):
    run = make("run", 3, record=RECORD)
    (run / "failed.txt").write_text("killed by SIGKILL\n")
    touch(run / "failed.txt", 60)
    assert read_run(run).state == "done"
    touch(run / "record.json", 90)
    assert read_run(run).reason == "killed by SIGKILL"


# Damage


def test_broken_lines_are_skipped(make):
    run = make("run", 2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"epoch": "x"}\n\x00\n{"epoch": 3, "val_ra": "high", "load": [["a"], 3]}\n{"epoch": 3, "val')
    status = read_run(run)
    assert [row.epoch for row in status.rows] == [1, 2, 3]
    assert "3/3" in view(run)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "method: [", "not YAML"),
        ("config.yaml", "epochs: 3", "unknown field 'epochs'"),
        ("record.json", '{"sa": 6', "record.json: is not JSON"),
    ],
)
def test_damaged_file_is_a_line_below_the_table_and_the_others_are_shown(file, text, message, make, tmp_path):
    make("good", 3, record=RECORD)
    (make("bad", 3) / file).write_text(text)
    output = view(tmp_path)
    (reason,) = [line for line in output.splitlines() if line.startswith("bad: ")]
    assert message in reason
    assert "23.4" in output


def test_names_and_reasons_cannot_drive_the_terminal(make, tmp_path):
    mark_failed(make("red\x1b[31m", 1), "two\nlines \x1b[2J")
    output = view(tmp_path)
    assert "\x1b" not in output
    assert r"red\x1b[31m: two lines \x1b[2J" in output


def test_a_run_of_a_method_whose_script_is_not_loaded_is_listed_as_any_other(make, tmp_path):
    file = make("second", 3, record=RECORD) / "config.yaml"
    file.write_text(file.read_text().replace("method: advmoe", "method: mine"))
    output = view(tmp_path)
    assert " ".join(output.splitlines()[-2].split()).startswith("│ second │ done │ mine │ fashion-mnist │ 3/3 │")


def test_damaged_shards_are_tolerated(make):
    run = make("run", 3, shards=(5.0,))
    (run / "evaluation/shard-00001.json").write_text('{"rows": [')
    (run / "evaluation/shard-00002.json").write_text('{"attacks": 3}')
    assert read_run(run).state == "evaluating"
    assert "evaluating, 3 shards" in view(run)


# The table


def test_the_table_shows_what_the_files_contain(make, tmp_path):
    make("deep/er/first", 2)
    make("second", 3, record=RECORD)
    make("third", 3, record=QUICK)
    lines = {line.split()[1]: " ".join(line.split()) for line in view(tmp_path).splitlines() if line.startswith("│")}
    assert list(lines) == ["deep/er/first", "second", "third"]
    first = r"│ deep/er/first │ training │ advmoe │ fashion-mnist │ 2/3 │ 2.125 │ 42.0 │ 20.0 │ 7% │ 2.5 │ \d+ s │ │ │ ▅█"
    assert re.match(first, lines["deep/er/first"])
    assert "│ 23.4 │ 61.2 │" in lines["second"]
    assert "│ 30.0 (quick) │ 50.0 │" in lines["third"]


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_drops_columns_but_cuts_no_figure(width, make, tmp_path):
    make("cifar10-at_small_dense-0", 2, method="at_small_dense")
    output = view(tmp_path, width)
    assert max(map(len, output.splitlines())) <= width
    assert "training" in output
    assert "20.0" in output
    assert "…" not in output
    assert [label for label in LABELS if label in output] < [label for label in LABELS if label in view(tmp_path)]


def test_the_config_yaml_of_wandb_is_no_run(make, tmp_path):
    folder = make("run", 1) / "wandb/offline-run-1/files"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("wandb_version: 1")
    assert [status.path.name for status in statuses(tmp_path)] == ["run"]


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0] * 100) == "█" * 16
    assert sparkline([0.0] * 8 + [10.0] * 24) == "▁▁▁▁" + "█" * 12
    assert sparkline([]) == ""
    assert sparkline([0.0]) == "▁"


# The command


def test_without_a_terminal_it_prints_once_and_all_columns(make, tmp_path, capsys):
    make("run", 3, record=RECORD)
    watch.run(read("watch", [str(tmp_path)]))
    output = capsys.readouterr().out
    assert all(label in output for label in LABELS)
    assert "\x1b" not in output


def test_names_are_printed_as_they_are(make, tmp_path, capsys):
    folder = tmp_path / "lr[best]"
    folder.mkdir()
    console().print(watch._view(folder, console()), soft_wrap=True)
    make("lr[best]/x[a]", 1)
    watch.run(read("watch", [str(tmp_path)]))
    lines = capsys.readouterr().out
    assert lines.startswith(f"no run below {folder} yet\n")
    assert "lr[best]/x[a]" in lines


def test_on_a_terminal_it_refreshes_until_it_is_interrupted(make, tmp_path, monkeypatch):
    waits = []
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(watch, "console", lambda: terminal)

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            make("appeared", 1)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.run(read("watch", [str(tmp_path), "--interval", "2"]))
    assert waits == [2.0, 2.0]
    output = terminal.file.getvalue()
    assert output.index("no run below") < output.index("appeared")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], ".: holds no run (no config.yaml in it or below)"),
        ([".", "--interval", "0"], "interval must be 0.1 to 86400 seconds, not 0"),
        ([".", "--interval", "nan"], "interval must be"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        watch.run(read("watch", arguments))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "odd", [float("nan"), float("inf"), -float("inf"), True, 10**400], ids=["nan", "inf", "-inf", "true", "big"]
)
def test_values_that_are_no_finite_numbers_are_shown_as_missing(make, tmp_path, odd):
    run = make("odd", 2)
    names = ("loss", "val_sa", "val_ra", "train_seconds", "validate_seconds", "iterations")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(3, load=[[odd, 0.25]], **dict.fromkeys(names, odd))) + "\n")
        file.write(json.dumps(row(3) | {"epoch": odd}) + "\n")
    console = Console(file=io.StringIO(), width=240)
    console.print(watch_view(statuses(tmp_path), tmp_path, console))
    text = console.file.getvalue()
    assert "3/3" in text
    assert "25%" in text
    assert not [word for word in ("nan", "inf", "1.0", "True") if word in text]
