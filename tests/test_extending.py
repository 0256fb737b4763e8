"""docs/extending.md: every snippet is short, and what it adds also works on the command line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorder import Recorder
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import advmoe
from advmoe.cli.main import main
from advmoe.config import ModelConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.errors import UserError
from advmoe.evaluation.record_file import write_record
from advmoe.evaluation.target import EvaluationOptions
from advmoe.models import MODELS, build_model
from advmoe.moe import MoEKind
from advmoe.runs.evaluate import evaluate_folder
from advmoe.training.loop import train
from advmoe.training.methods import METHODS

pytestmark = pytest.mark.usefixtures("registries")

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: re.findall(r"```python\n(.*?)```", part, flags=re.S) for part in PAGE.split("\n## ")[1:]}


def run(section, number=0):
    names = {"__name__": "block"}
    exec(compile(SECTIONS[section][number], section, "exec"), names)
    return names


def test_each_extension_has_a_snippet_of_under_30_lines():
    assert list(SECTIONS) == [
        "Your own convolutional network",
        "A backbone",
        "A data set",
        "A method",
        "A gate",
        "A loss",
        "An attack",
        "A column in the reports",
        "A training loop",
        "Other programs",
    ]
    for section, blocks in SECTIONS.items():
        assert blocks or section == "Other programs", section
        assert all(len(block.splitlines()) < 30 for block in blocks), section


def test_a_training_loop_changes_both_levels():
    names = run("A training loop")
    assert names["outcome"].total.isfinite()
    for level, optimizer in names["optimizers"].items():
        assert len(optimizer.state) == len(names["levels"][level]), level


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_as_documented(tmp_path):
    model = run("A training loop")["model"].train().requires_grad_(True)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # without it the second pass raises
            parallel(torch.rand(4, 1, 28, 28)).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_other_processes_load_the_script(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import subprocess, sys, advmoe.cli\n"
        "from advmoe.models import MODELS\n"
        "MODELS['mine'] = (None, 8)\n"
        "if __name__ == '__main__':\n"
        "    assert advmoe.cli.main(['--version']) == 0\n"
        "    code = 'from advmoe import extension; from advmoe.models import MODELS; extension.load(); print(*MODELS)'\n"
        "    raise SystemExit(subprocess.run([sys.executable, '-c', code]).returncode)\n"
    )
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert answer.stdout.split()[-1] == "mine"


def test_commands_train_evaluate_and_attack_with_what_was_added(tmp_path, capsys):
    run("A data set"), run("A backbone"), run("An attack")
    command = ["train", "--recipe", "fashion-mnist-resnet18-advmoe", "--dataset", "stripes", "--backbone", "tower", "--width", "4"]
    flags = ["--limit-train", "40", "--limit-test", "20", "--epochs", "1", "--batch-size", "20", "--device", "cpu"]
    assert main([*command, *flags, "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--attacks", "pgd_10", "corners", "--device", "cpu"]) == 0
    assert "corners" in capsys.readouterr().out


def test_a_registered_gate_and_loss_are_named_by_the_configuration(tiny, splits, recorder, tmp_path):
    run("A gate"), run("A loss")
    config = tiny("at_moe", epochs=1, loss="both", router_gate="noisy", router_attack_gate="noisy")
    assert train(config, splits, tmp_path / "run", recorder)[0]["loss"] > 0


def test_a_converted_network_trains_as_a_backbone(tiny, splits, recorder, tmp_path):
    run("Your own convolutional network", 1)
    history = train(tiny("advmoe", backbone="mine", epochs=1), splits, tmp_path / "run", recorder)
    assert len(history[0]["load"]) == 1


def test_a_converted_network_is_resumed_published_and_loaded(tiny, splits, tmp_path, monkeypatch):
    run("Your own convolutional network", 1)
    config = tiny("advmoe", backbone="mine", width=4, epochs=2)
    train(config, splits, tmp_path / "unbroken", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda epoch, done: (epoch, done) == (2, 2)))
    train(config, splits, tmp_path / "run", Recorder(), resume=True)
    model, x = advmoe.load(tmp_path / "run"), torch.rand(4, 1, 28, 28)
    assert torch.equal(model(x), advmoe.load(tmp_path / "unbroken")(x))
    monkeypatch.setattr("advmoe.hub.publish", lambda folder, name, private: shutil.copytree(folder, tmp_path / "hub"))
    options = EvaluationOptions(0.1, preset=("pgd_10",))
    write_record(tmp_path / "run" / "record.json", evaluate_folder(tmp_path / "run", config, splits, options))
    advmoe.push_to_hub(tmp_path / "run", "someone/mine")
    published = advmoe.load(tmp_path / "hub")
    assert torch.equal(published(x), model(x))
    assert published.record is not None
    monkeypatch.delitem(MODELS, "mine")
    for folder in (tmp_path / "hub", tmp_path / "run"):
        with pytest.raises(UserError, match=r"its backbone 'mine' is not in advmoe.models.MODELS: load the script that adds it"):
            advmoe.load(folder)
    run("Your own convolutional network", 1)
    monkeypatch.delitem(METHODS, "advmoe")
    with pytest.raises(UserError, match=r"run: unknown method 'advmoe': .*; or load the script that adds it \(ADVMOE_EXTENSION="):
        advmoe.load(tmp_path / "run")


def test_a_file_that_could_not_be_loaded_is_not_written(tiny, tmp_path):
    run("Your own convolutional network", 1)
    model = build_model(ModelConfig(backbone="mine"), MoEKind(0.5, num_experts=2), SPEC)
    with pytest.raises(UserError, match=r"x.safetensors: could not be loaded again: the configuration describes another network"):
        advmoe.save_file(advmoe.Loaded(model, tiny("advmoe"), SPEC), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
