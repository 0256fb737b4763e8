"""`advmoe evaluate`: killed and continued, divided among processes, and its errors of one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import budget
from refused_commands import refused
from small_backbone import SMALL

from advmoe import distributed
from advmoe.attacks.registry import ATTACKS, Attack
from advmoe.cli.arguments.evaluate import EvaluateCommand
from advmoe.cli.evaluate import WORKER, _evaluate_in_workers
from advmoe.cli.main import main
from advmoe.config import RuntimeConfig
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.evaluation import PRESETS, EvaluationOptions
from advmoe.evaluation.claim import claimed
from advmoe.evaluation.record_file import read_record
from advmoe.evaluation.store import remove_results
from advmoe.models.digest import weights_digest
from advmoe.reports.collect import collect
from advmoe.reports.summaries import summarise
from advmoe.runs.evaluate import evaluate_folder, find_subject
from advmoe.training.checkpoint import RunFolder

pytestmark = pytest.mark.usefixtures("small_processes")

TINY = [
    "--recipe", "demo-advmoe", "--method", "at_moe", "--norms", "shared", "--backbone", SMALL, "--width", "4",
    "--limit-train", "100", "--limit-test", "12", "--batch-size", "20", "--num-steps", "1", "--epochs", "2",
    "--tied-share", "0", "--epsilon", "0.02", "--device", "cpu",
]  # fmt: skip
PLAN = ["--attacks", "pgd_10", "reroute_quick", "--limit-test", "12", "--shard-size", "4", "--device", "cpu", "--threads", "1"]
WITH_TRANSFER = [*PLAN[:1], "transfer", *PLAN[1:]]
SHORT = ["--attacks", "pgd_10", "--limit-test", "3", "--device", "cpu", "--threads", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained):
    """A finished tiny run without an evaluation."""
    remove_results(trained / "evaluation")
    return trained


@pytest.fixture(scope="module")
def unbroken(trained):
    """The evaluation of a process that was not interrupted."""
    assert main(["evaluate", str(trained), *PLAN]) == 0
    evaluation = figures(trained)
    assert "1" in evaluation["flags"]
    return evaluation


def figures(run):
    """The evaluation in record.json without its times."""
    evaluation = json.loads((run / "record.json").read_text())["evaluation"]
    evaluation["attacks"] = {name: {**attack, "seconds": 0} for name, attack in evaluation["attacks"].items()}
    return evaluation


def error_line(capsys, *arguments):
    return refused(capsys, "evaluate", *arguments)


def paused(run, *arguments, **environment):
    """A process that evaluates, and waits once it has written the second shard for the first time."""
    return subprocess.Popen(
        [sys.executable, "-m", "advmoe", "evaluate", str(run), *PLAN, *arguments],
        env={**ENVIRONMENT, "PAUSE_AT": "evaluation/shard-00001.json", **environment},
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_second_shard(process, run):
    while process.poll() is None and not (run / "evaluation/shard-00001.json").exists():
        time.sleep(0.01)


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_second_evaluation_is_refused_until_the_first_is_killed_and_then_continues_to_the_same_record(unbroken, run, capsys):
    """A real SIGKILL in the middle of a real process."""
    (run / "record.json").unlink(missing_ok=True)
    process = paused(run)
    wait_for_second_shard(process, run)
    before = contents(run)
    for arguments in (["--fresh"], ["--part", "1", "2"], ["--processes", "2"]):
        line = error_line(capsys, run, *PLAN, *arguments)
        assert f"{run}/evaluation: process {process.pid} on " in line
        assert line.endswith(" is already evaluating in this folder; wait for it to finish\n")
    config = RunFolder(run).config()
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        evaluate_folder(run, config, load_dataset(config.data), EvaluationOptions(0.02, preset=("pgd_10",)))
    assert contents(run) == before
    assert process.poll() is None
    process.kill()
    assert process.wait() == -9
    assert not (run / "record.json").exists()
    assert main(["evaluate", str(run), *PLAN]) == 0
    assert figures(run) == unbroken


def test_parts_that_are_collected_give_the_same_record(unbroken, run, capsys):
    for number in ("1", "0"):
        (run / "record.json").unlink(missing_ok=True)
        assert main(["evaluate", str(run), *PLAN, "--part", number, "2"]) == 0
        assert not (run / "record.json").exists()
    assert main(["evaluate", str(run), *PLAN]) == 0
    assert figures(run) == unbroken


def test_two_processes_give_the_same_record(unbroken, run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["evaluate", str(run), "--processes", "2", *PLAN]) == 0
    assert figures(run) == unbroken
    assert len(list((run / "evaluation").glob("shard-*.json"))) == 3


def test_a_worker_uses_the_claim_of_its_parent_and_ends_with_it(run):
    with claimed(run / "evaluation"), paused(run, "--part", "1", "2", **{WORKER: "1"}) as process:
        wait_for_second_shard(process, run)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_shards_of_another_seed_are_one_line(run, capsys):
    assert main(["evaluate", str(run), *PLAN, "--part", "0", "3"]) == 0
    assert "holds shards of another seed (0, not 1)" in error_line(capsys, run, *PLAN, "--seed", "1")


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("echo 'advmoe: error: no memory' >&2; exit 2", "no memory"),
        ("echo 'advmoe: shard 1/3 pgd_10 done' >&2; kill -9 $$", "a worker process was killed, perhaps because memory ran out"),
    ],
)
def test_the_error_of_a_failing_worker_reaches_the_user(ending, message, run, tmp_path, capsys, monkeypatch):
    """A stand-in for the workers' Python, which takes seconds to start. Check 13 ran before, in the process that shows warnings."""
    worker = tmp_path / "python"
    worker.write_text(f"#!/bin/sh\necho 'a warning' >&2\n{ending}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr("advmoe.runs.evaluate.evaluate_run", None)  # only warnings come before the workers
    assert error_line(capsys, run, "--processes", "2", *PLAN) == f"advmoe: error: {message}\n"
    assert list(json.loads((run / "evaluation" / "checks.json").read_text())["checks"]) == ["finiteness"]
    assert not list((run / "evaluation").glob("shard-*.json"))


def test_a_failing_worker_ends_the_others(run, tmp_path, capsys, monkeypatch):
    worker = tmp_path / "python"
    fails = "echo 'advmoe: error: no memory' >&2\nexit 2"
    worker.write_text(f"#!/bin/sh\ncase \"$*\" in *'--part 1'*) exec sleep 600;; esac\n{fails}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    began = time.monotonic()
    assert error_line(capsys, run, "--processes", "2", *PLAN) == "advmoe: error: no memory\n"
    assert time.monotonic() - began < 500


def test_json_is_all_of_stdout_and_robustbench_has_its_fields(run, capsys, tmp_path):
    capsys.readouterr()
    path = tmp_path / "info.json"
    assert main(["evaluate", str(run), *SHORT, "--json", "--robustbench", str(path), "--epsilon", "8/255"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((run / "record.json").read_text())
    info = json.loads(path.read_text())
    assert info["eps"] == "8/255"
    assert info["clean_acc"] == f"{record['sa']:.2f}"


def test_l2_says_what_is_skipped_and_images_are_saved(run, capsys):
    assert main(["evaluate", str(run), *PLAN, "--norm", "L2", "--epsilon", "0.5", "--save-adversarial"]) == 0
    assert "left out, works only in Linf: reroute_quick" in capsys.readouterr().out
    assert list((run / "evaluation/adversarial").glob("pgd_10-*.safetensors"))


def test_json_has_the_comparison_with_the_control(run, capsys):
    assert main(["evaluate", str(run), *PLAN]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), *PLAN, "--json", "--control", str(run)]) == 0
    control = json.loads(capsys.readouterr().out)["control"]
    assert (control["run"], control["difference"]["value"]) == (run.name, 0.0)
    assert "this trained network is not apart from that one" in control["text"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_processes_are_divided_among_the_cuda_devices(tmp_path, monkeypatch, device):
    worker = tmp_path / "python"
    worker.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command = EvaluateCommand(run=tmp_path, processes=3, runtime=RuntimeConfig(device=device), argv=("run", "--device", device))
    _evaluate_in_workers(command, lambda: None)
    devices = sorted(line.rpartition("--device ")[2] for line in (tmp_path / "calls").read_text().splitlines())
    assert devices == ["cuda:0", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--standard", "--quick"], "--quick, --standard, --full and --attacks exclude each other"),
        (["--part", "2", "2"], "part must be i k with 0 <= i < k, not 2 2"),
        (["--part", "0", "2", "--fresh"], "--part excludes --processes, and --fresh"),
        (["--processes", "0"], "processes must be at least 1, not 0"),
        (["--attacks", "rerout"], "unknown attack 'rerout': did you mean reroute"),
        (["--attacks"], "--attacks needs a value (see advmoe evaluate --help)"),
        (["--attacks", "transfer"], "nothing can be run of transfer"),
        (["--limit-test", "x"], "error: --limit-test must be INT (see advmoe evaluate --help)"),
        (["--part", "1"], "error: --part must be INT INT (see advmoe evaluate --help)"),
        (["--epsilon", "0/0"], "error: --epsilon must be a number or a fraction such as 8/255 (see"),
        (["--epsilon", "-1"], "epsilon must be at least 0 and finite, not -1"),
        (["--seed", "-1"], "seed must be in"),
        (["--name", "../few"], "name must be up to 100 letters, digits and . _ + - (not as the first), not '../few'"),
        (["--norm", "L2"], "--norm L2 needs --epsilon"),
        (["--attacks", "transfer", "--transfer", "nowhere"], "nowhere: no run's folder, no file, no name on the hub"),
        (["--test-set", "nowhere"], "nowhere: no such file or folder"),
        (["--test-set", "x", "--data-dir", "y"], "--test-set and --data-dir exclude each other"),
        (["--test-set", "x", "--corruption", "fog"], "--corruption and --severity go together"),
        (["--test-set", "x", "--corruption", "fog", "--severity", "6"], "severity must be 1 to 5, not 6"),
        (["--corruption", "fog", "--severity", "1"], "--corruption needs --test-set"),
        (["--test-set", "x", "--corruption", "fog/3", "--severity", "3"], "--corruption fog/3: must be a name without folders"),
        (["--robustbench", "."], ".: is a folder; "),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert message in error_line(capsys, run, *arguments, "--device", "cpu")


def test_a_control_for_another_threat_model_or_other_images_is_refused_before_the_attacks(run, capsys, monkeypatch):
    assert main(["evaluate", str(run), *PLAN]) == 0
    monkeypatch.setattr("advmoe.runs.evaluate.evaluate_run", None)
    line = error_line(capsys, run, *PLAN, "--epsilon", "0.01", "--control", str(run))
    assert line.endswith("was evaluated with Linf epsilon 0.02, not Linf epsilon 0.01: not a control for this run\n")
    line = error_line(capsys, run, *PLAN, "--limit-test", "5", "--control", str(run))
    assert line.endswith("was evaluated on other test images: not a control for this run\n")


def test_a_control_that_is_not_evaluated_is_one_line(run, capsys, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "control", ignore=shutil.ignore_patterns("evaluation*", "record.json"))
    line = error_line(capsys, run, *PLAN, "--control", str(tmp_path / "control"))
    assert f"control: is not evaluated yet (no record.json); run advmoe evaluate {tmp_path / 'control'} first" in line
    monkeypatch.setattr("advmoe.extension.command", lambda: "python mine.py")
    line = error_line(capsys, run, *PLAN, "--control", str(tmp_path / "control"))
    assert f"run python mine.py evaluate {tmp_path / 'control'} first" in line


@pytest.mark.parametrize("flags", [["--part", "0", "2"], ["--processes", "2"]])
def test_torchrun_shares_the_shards_itself(flags, run, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "torchrun already shares the shards between its processes" in error_line(capsys, run, *PLAN, *flags)


def test_a_saved_file_is_evaluated_like_its_run(unbroken, run, tmp_path):
    import advmoe

    path = tmp_path / "net.v2.safetensors"
    model = advmoe.load(run)
    advmoe.save_file(model, path)
    assert main(["evaluate", str(path), *WITH_TRANSFER, "--transfer", str(path)]) == 0
    (record,) = tmp_path.glob("*.record.json")
    assert record.name == "net.v2.record.json"
    evaluated = json.loads(record.read_text())
    assert evaluated["run"] == "net.v2"
    attacks = evaluated["evaluation"]["attacks"]
    assert "transfer" in attacks
    assert {name: attacks[name]["broken"] for name in unbroken["attacks"]} == {
        name: attack["broken"] for name, attack in unbroken["attacks"].items()
    }
    recorded = json.loads((run / "record.json").read_text())
    known = ("history", "train_seconds", "train_images", "epoch", "trained_by")
    assert [evaluated[name] for name in known] == [recorded[name] for name in known]
    assert find_subject(path).on_test_set().trained.train_images == recorded["train_images"] > 0
    with torch.no_grad():
        next(iter(model.network.parameters())).mul_(1.5)
    advmoe.save_file(model, path)
    assert main(["evaluate", str(path), *SHORT, "--fresh"]) == 0
    changed = json.loads(record.read_text())
    assert changed["weights"] == weights_digest(model.network) != evaluated["weights"]


def test_another_test_set_does_not_change_the_runs_record(unbroken, run, tmp_path, capsys, caplog):
    from advmoe.data import load_dataset
    from advmoe.training.checkpoint import RunFolder

    test = load_dataset(RunFolder(run).config().data).test
    folder = tmp_path / "f[c]"
    folder.mkdir()
    np.save(folder / "invert.npy", np.tile(255 - test.raw.numpy(), (5, 1, 1, 1)))
    np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5))
    before = (run / "record.json").read_bytes()
    arguments = [str(run), *PLAN, "--test-set", str(folder), "--corruption", "invert", "--severity", "2"]
    message = error_line(capsys, *arguments, "--control", run)
    assert message.endswith(f"run advmoe evaluate {run} --test-set '{folder}' --corruption invert --severity 2 first\n")
    assert main(["evaluate", str(run), *WITH_TRANSFER, *arguments[len(PLAN) + 1 :], "--transfer", str(run)]) == 0
    assert "f[c]-invert-2, 12 test images" in capsys.readouterr().out
    assert (run / "record.json").read_bytes() == before
    assert (run / "evaluation-f[c]-invert-2/shard-00000.json").exists()
    recorded, other = (read_record(run / name) for name in ("record.json", "f[c]-invert-2.record.json"))
    assert (other.dataset, other.run, other.train_images, other.epoch) == (
        "f[c]-invert-2",
        recorded.run,
        recorded.train_images,
        recorded.epoch,
    )
    assert (other.weights, other.test_images, len(other.gallery) > 0) == (recorded.weights, 12, True)
    assert "transfer" in other.evaluation.attacks
    assert other.fingerprint != recorded.fingerprint
    caplog.clear()
    assert [record.dataset for record in collect(run)] == [recorded.dataset]
    shutil.copy(run / "f[c]-invert-2.record.json", tmp_path / "other.json")
    shutil.copy(run / "record.json", tmp_path / "own.json")
    assert len(summarise(collect(tmp_path))) == 2  # never means over both
    assert caplog.messages == []


def test_an_evaluation_with_a_name_stays_beside_that_of_the_run(run, capsys, caplog):
    assert main(["evaluate", str(run), *PLAN]) == 0
    before = contents(run)
    line = error_line(capsys, run, *SHORT)
    assert "holds results on other test images" in line
    assert "give this evaluation a --name, or delete those results by --fresh" in line
    few = [str(run), *SHORT, "--name", "few"]
    assert f"(no few.record.json); run advmoe evaluate {run} --name few first" in error_line(capsys, *few, "--control", run)
    assert main(["evaluate", *few]) == 0
    after = contents(run)
    assert {path: after[path] for path in before} == before
    new = {str(path.relative_to(run)) for path in after.keys() - before.keys()}
    assert {"few.record.json", "evaluation-few/shard-00000.json"} <= new
    assert all(path.startswith(("few.", "evaluation-few/")) for path in new)
    recorded, named = (read_record(run / name) for name in ("record.json", "few.record.json"))
    assert (named.test_images, named.train_images, named.fingerprint) == (3, recorded.train_images, recorded.fingerprint)
    caplog.clear()
    assert len(collect(run)) == 1
    assert caplog.messages == []


def test_an_attack_that_changes_the_network_is_one_line(run, capsys, registries):
    ATTACKS["bad"] = Attack(lambda job: job.x + 0 * next(job.predict.parameters()).data.mul_(2).sum())
    assert "error: attack 'bad' changed" in error_line(capsys, run, *SHORT, "--attacks", "bad")


def test_file_without_a_network_and_other_data_are_one_line(run, tmp_path, capsys):
    import advmoe

    path = tmp_path / "net.safetensors"
    path.write_bytes(b"no weights")
    assert "net.safetensors: not a safetensors file" in error_line(capsys, path, *PLAN)
    model = advmoe.load(run)
    model.spec = replace(model.spec, classes=tuple(f"class {number}" for number in range(10)))
    advmoe.save_file(model, path)
    assert "net.safetensors: is for other classes or image sizes than the data set" in error_line(capsys, path, *PLAN)
    assert not list(tmp_path.glob("*.record.json"))


def test_folder_without_a_run_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/thesis.tex").write_text("mine")
    assert "holds no run" in error_line(capsys, tmp_path, "--fresh")
    assert (tmp_path / "evaluation/thesis.tex").exists()


def test_other_data_is_refused(run, capsys, monkeypatch):
    from advmoe.cli import evaluate

    real = evaluate.load_dataset
    monkeypatch.setattr(evaluate, "load_dataset", lambda config: replace(real(config), fingerprint="other"))
    message = error_line(capsys, run, "--device", "cpu")
    assert "fashion-mnist: fingerprint other, but" in message
    assert "was trained on" in message


def test_damaged_shard_is_one_line(run, capsys):
    assert main(["evaluate", str(run), *PLAN, "--part", "1", "3"]) == 0
    capsys.readouterr()
    (run / "evaluation/shard-00001.json").write_text('{"rows"')
    assert "shard-00001.json: is damaged" in error_line(capsys, run, *PLAN)


def test_help_shows_what_each_preset_costs(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for preset in PRESETS.values():
        assert re.sub(r"(?<=\d),(?=\d)", "", budget(preset)) in output
    assert output.count("79 APGD passes") == 1
    assert not any(word in output for word in ("QUICK", "STANDARD", "FULL"))


@pytest.mark.parametrize(("arguments", "what"), [([], "the Record"), (["--part", "0", "3"], "the results")])
def test_a_run_that_cannot_be_written_is_refused_before_any_attack(run, capsys, monkeypatch, arguments, what):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (run, os.W_OK))  # root may write anywhere
    assert error_line(capsys, run, *PLAN, *arguments) == f"advmoe: error: {run}: {what} cannot be written to this folder\n"
    assert not (run / "evaluation").exists()


def test_a_record_of_a_newer_version_is_not_replaced(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "record.json").write_text('{"schema": 99}')
    assert f"{copy}/record.json: holds a Record of schema 99; " in error_line(capsys, copy, *PLAN)
    assert not (copy / "evaluation").exists()


def test_a_wrong_value_beside_fresh_deletes_nothing(run, capsys):
    assert main(["evaluate", str(run), *PLAN, "--part", "0", "3"]) == 0
    capsys.readouterr()
    before = sorted(path.name for path in (run / "evaluation").iterdir())
    assert "unknown attack 'pgd_51'" in error_line(capsys, run, "--fresh", "--attacks", "pgd_51")
    assert "epsilon must be at most 1 in Linf, not 8" in error_line(capsys, run, "--fresh", *PLAN, "--epsilon", "8")
    assert "nothing can be run of transfer" in error_line(capsys, run, "--fresh", "--attacks", "transfer")
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == before


# Output that would replace the network or its Record


@pytest.mark.parametrize("name", ["net.safetensors", "net.record.json", "net.gallery.json"])
def test_the_robustbench_file_replaces_neither_the_network_nor_its_record(run, tmp_path, capsys, name):
    import advmoe

    advmoe.save_file(advmoe.load(run), tmp_path / "net.safetensors")
    before = (tmp_path / "net.safetensors").read_bytes()
    line = error_line(capsys, tmp_path / "net.safetensors", *SHORT, "--robustbench", tmp_path / name)
    assert line.endswith(f"the RobustBench file could replace {tmp_path / name}; give another name\n")
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
    assert (tmp_path / "net.safetensors").read_bytes() == before
    assert f"could replace a file of {run};" in error_line(capsys, run, *SHORT, "--robustbench", run / "config.yaml")


# Flags that would have no effect


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transfer", "other"], "--transfer is for the attack transfer, which is not run: --standard and --full have it"),
        ([*PLAN, "--transfer", "other"], "--transfer is for the attack transfer, which is not run"),
        ([*PLAN, "--pathway-budget", "8"], "--pathway-budget is for the attack paths, which is not run"),
        ([*PLAN, "--part", "0", "2", "--robustbench", "info.json"], "--part excludes --robustbench"),
        ([*PLAN, "--part", "0", "2", "--keep-images"], "--part excludes --keep-images"),
        ([*PLAN, "--part", "0", "2", "--json"], "--part excludes --json"),
        ([*PLAN, "--part", "0", "2", "--control", "other"], "--part excludes --control"),
    ],
)
def test_a_flag_without_effect_is_refused(run, capsys, arguments, message):
    assert message in error_line(capsys, run, *arguments)
    assert not (run / "evaluation").exists()


def test_workers_take_their_flags_before_the_end_of_the_flags(run, capsys):
    """They inherit flags that a part given by a user excludes."""
    assert main(["evaluate", *PLAN, "--processes", "2", "--json", "--", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run.name
