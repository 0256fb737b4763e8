"""Grids of the paper's and of files."""

import pytest

from advmoe.errors import UserError
from advmoe.sweep.plan import grid, plan

FILE = """
methods: [at_dense, advmoe]
datasets: [fashion-mnist]
model_scales: [0.25, 0.5]
seeds: [3, 7]
settings: {training: {epochs: 2, lr: 5e-2}, model: {num_experts: 4}, attack: {epsilon: 8/255}}
"""


def written(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("what", "cells"), [("a1", 10), ("a2", 26), ("fig7", 26), ("figA2", 5)])
def test_papers_grids_hold_every_cell_once_a_seed(what, cells):
    runs = plan(grid(what))
    assert len({run.name for run in runs}) == len(runs) == 3 * cells
    assert {run.config.method for run in runs} == {"at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe"}
    assert {run.config.attack.num_steps for run in runs} == {10 if what == "a1" else 2}


def test_a2_of_one_backbone_on_other_data():
    runs = plan(grid("a2"), ["resnet18", "s0"], "fashion-mnist", {"training": {"epochs": 1}, "data": {"limit_train": 256}})
    scales = {(run.config.method, run.config.model.model_scale) for run in runs}
    four = ("at_small_dense", "at_sparse", "at_moe", "advmoe")
    assert scales == {("at_dense", 0.5), *((method, scale) for method in four for scale in (0.2, 0.5, 0.8))}
    assert len(runs) == 13
    assert {run.config.data.dataset for run in runs} == {"fashion-mnist"}
    assert {run.config.attack.epsilon for run in runs} == {0.1}
    assert {(run.config.training.epochs, run.config.data.limit_train) for run in runs} == {(1, 256)}
    assert "fashion-mnist-resnet18-advmoe-r0.8-s0" in {run.name for run in runs}


def test_seeds_come_one_after_another_and_make_the_names():
    runs = plan(grid("figA2"))
    assert [run.config.seed for run in runs] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(run.name.endswith(f"-s{run.config.seed}") for run in runs)


@pytest.mark.parametrize(("only", "count"), [(["r0.5"], 24), (["r0.5", "advmoe"], 6), (["at_dense"], 6), (["wrn28_10", "s2"], 13)])
def test_only_keeps_runs_that_hold_every_text(only, count):
    assert len(plan(grid("a2"), only)) == count


def test_file(tmp_path):
    found = plan(grid(written(tmp_path, FILE)))
    cells = ("at_dense", "advmoe-r0.25", "advmoe")
    assert [run.name for run in found] == [f"fashion-mnist-resnet18-{cell}-s{seed}" for seed in (3, 7) for cell in cells]
    moe = found[1].config
    assert (moe.training.epochs, moe.training.lr, moe.model.num_experts, moe.model.model_scale) == (2, 0.05, 4, 0.25)
    assert moe.attack.epsilon == 8 / 255


def test_every_model_scale_has_a_name_of_its_own_and_is_trained_as_it_is_written(tmp_path):
    text = "methods: [advmoe]\nmodel_scales: [0.123456789, 0.123457, 0.00001, 1]\nseeds: 1\n"
    found = plan(grid(written(tmp_path, text)))
    assert [run.config.model.model_scale for run in found] == [0.123456789, 0.123457, 0.00001, 1]
    names = [run.name.removeprefix("cifar10-resnet18-advmoe-") for run in found]
    assert names == ["r0.123456789-s0", "r0.123457-s0", "r0.00001-s0", "r1-s0"]
    assert found[0].label.endswith(" r0.123456789")


def test_command_line_comes_over_the_file(tmp_path):
    found = plan(grid(written(tmp_path, FILE)), settings={"training": {"epochs": 9}})
    assert {(run.config.training.epochs, run.config.training.lr) for run in found} == {(9, 0.05)}


def test_empty_file_is_the_five_methods(tmp_path):
    names = [run.name for run in plan(grid(written(tmp_path, "{}")))]
    assert names == [run.name for run in plan(grid("figA2"))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [advmoe]", "unknown field 'method': did you mean methods"),
        ("methods: [advmo]", "methods has no 'advmo': did you mean advmoe"),
        ("methods: advmoe", "methods must be a list of names, not 'advmoe'"),
        ("backbones: [resnet]", "backbones has no 'resnet': did you mean resnet18"),
        ("datasets: [cifar]", "datasets has no 'cifar': did you mean cifar10"),
        ("model_scales: [2]", "model_scales must be a list of numbers in (0, 1], not [2]"),
        ("seeds: 0", "seeds must be a number of seeds from 1 to 1000, or a list of so many, not 0"),
        ("settings: {training: {epoch: 1}}", "unknown field 'training.epoch': did you mean epochs"),
        ("settings: {training: {epochs: 0}}", "epochs must be at least 1, not 0"),
        ("settings: {train: {epochs: 1}}", "unknown field 'train': did you mean training"),
        ("settings: {training: 3}", "training must be a section with fields, not 3"),
        ("settings: 3", "settings must be a mapping of sections, not 3"),
        ("seeds: 1001", "seeds must be a number of seeds from 1 to 1000, or a list of so many, not 1001"),
        ("seeds: [1, 9223372036854775808]", "a seed must be a whole number in [0, 2**63), not 9223372036854775808"),
        ("seeds: [-1]", "a seed must be a whole number in [0, 2**63), not -1"),
        ("settings: {schema: 3}", "settings: unknown field 'schema': there is attack, data, model, training"),
        ("settings: {seed: 3}", "seed is not set here but by seeds"),
        ("settings: {model: {model_scale: 0.2}}", "model.model_scale is not set here but by model_scales"),
        ("settings: {runtime: {threads: 2}}", "runtime is not set here but by --device"),
        ("[1, 2]", "holds no mapping of fields"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files_are_refused_with_what_would_be_right(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        grid(written(tmp_path, text))
    assert said in str(error.value)
    assert "grid.yaml" in str(error.value)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown sweep 'fig8', neither FILE.yaml nor one of the paper's: did you mean fig7"):
        grid("fig8")
    with pytest.raises(UserError, match=r"no-such\.yaml: cannot be read"):
        grid("no-such.yaml")
    with pytest.raises(
        UserError, match="--only vgg: no run has that in its name; the first of 15 is 'cifar10-resnet18-at_dense-s0"
    ):
        plan(grid("figA2"), ["vgg"])
    with pytest.raises(UserError, match="unknown dataset 'cifar': did you mean cifar10"):
        plan(grid("figA2"), dataset="cifar")
    with pytest.raises(UserError, match=r"command line: training\.epochs must be at least 1"):
        plan(grid("figA2"), settings={"training": {"epochs": 0}})


@pytest.mark.parametrize("field", ["methods", "model_scales", "settings", "settings: {training"])
def test_aliases_of_aliases_do_not_swell_the_message(tmp_path, field):
    levels = ["- &a0 [x, x]"] + [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = "datasets:\n" + "\n".join(levels) + f"\n{field}: *a11" + ("}" if "{" in field else "")
    with pytest.raises(UserError) as error:
        grid(written(tmp_path, text))
    assert len(str(error.value)) < 400


def test_lists_that_multiply_to_more_runs_than_anybody_has(tmp_path):
    scales = ", ".join(f"0.{number}" for number in range(1000, 9000))
    with pytest.raises(UserError, match=r"plans 72000 runs, at most 10000 are; some lists are too long"):
        grid(written(tmp_path, f"methods: [at_moe, at_moe, advmoe, at_sparse]\nseeds: 3\nmodel_scales: [{scales}]"))


def test_names_given_twice_count_once(tmp_path):
    text = f"methods: [{', '.join(['advmoe'] * 5000)}]\nbackbones: [{', '.join(['resnet18'] * 5000)}]\nseeds: 1\n"
    assert len(plan(grid(written(tmp_path, text)))) == 1
