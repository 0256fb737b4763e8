"""The runs of the paper's grids and of sweep files."""

import pytest

from advmoe.data import DATASETS
from advmoe.errors import UserError
from advmoe.sweep.grid import read_sweep
from advmoe.sweep.plan import plan

FILE = """
methods: [at_dense, advmoe]
datasets: [fashion-mnist]
model_scales: [0.25, 0.5]
seeds: [3, 7]
settings: {training: {epochs: 2, lr: 5e-2}, model: {num_experts: 4}, attack: {epsilon: 8/255}}
"""


@pytest.mark.parametrize(("table", "cells"), [("a1", 10), ("a2", 26), ("fig7", 26), ("figA2", 5)])
def test_papers_grids_have_every_cell_once_for_each_seed(table, cells):
    runs = plan(read_sweep(table))
    assert len({run.name for run in runs}) == len(runs) == 3 * cells
    assert {run.config.method for run in runs} == {"at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe"}
    assert {run.config.attack.num_steps for run in runs} == {10 if table == "a1" else 2}


def test_a2_of_one_backbone_on_other_data():
    runs = plan(read_sweep("a2"), ["resnet18", "s0"], "fashion-mnist", {"training": {"epochs": 1}, "data": {"limit_train": 256}})
    scales = {(run.config.method, run.config.model.model_scale) for run in runs}
    four = ("at_small_dense", "at_sparse", "at_moe", "advmoe")
    assert scales == {("at_dense", 0.5), *((method, scale) for method in four for scale in (0.2, 0.5, 0.8))}
    assert len(runs) == 13
    assert {run.config.data.dataset for run in runs} == {"fashion-mnist"}
    assert {run.config.attack.epsilon for run in runs} == {0.1}
    assert {(run.config.training.epochs, run.config.data.limit_train) for run in runs} == {(1, 256)}
    assert "fashion-mnist-resnet18-advmoe-r0.8-s0" in {run.name for run in runs}


def test_seeds_come_one_after_another_and_are_part_of_the_names():
    runs = plan(read_sweep("figA2"))
    assert [run.config.seed for run in runs] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(run.name.endswith(f"-s{run.config.seed}") for run in runs)


@pytest.mark.parametrize(
    ("table", "only", "count"),
    [
        ("a2", ["r0.5"], 24), ("a2", ["r0.5", "advmoe"], 6), ("a2", ["at_dense"], 6), ("a2", ["wrn28_10", "s2"], 13),
        ("a2", ["advmoe-s0"], 2), ("a2", ["r0.8-s1"], 8), ("a1", ["s1"], 10), ("a1", ["-steps10-s1"], 10),
    ],
)  # fmt: skip
def test_only_keeps_runs_that_hold_every_text(table, only, count):
    """s1 does not select the runs whose names have -steps10."""
    assert len(plan(read_sweep(table), only)) == count


def test_only_compares_scales_and_numbers_of_experts_as_a_whole(write_sweep):
    runs = read_sweep(write_sweep("{methods: [advmoe], model_scales: [0.2, 0.25], num_experts: [1, 16], seeds: 1}"))
    assert [run.name for run in plan(runs, ["r0.2", "n1"])] == ["cifar10-resnet18-advmoe-r0.2-n1-s0"]
    with pytest.raises(UserError, match="--only r0: no run has this in its name"):
        plan(runs, ["r0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{recipes: [cifar10-resnet18-at_moe-n1], settings: {model: {num_experts: 4}}}",
            "settings: .* model.num_experts: 1, not 4",
        ),
        ("{recipes: [demo-at_moe-n1], settings: {model: {num_experts: 4}}}", "settings: .* model.num_experts: 1, not 4"),
        (
            "{recipes: [cifar10-resnet18-advmoe-steps10], settings: {attack: {num_steps: 2}}}",
            "settings: .* attack.num_steps: 10, not 2",
        ),
        ("{recipes: [cifar10-resnet18-advmoe-plus], settings: {training: {ema: 0}}}", "settings: .* training.ema: 0.995, not 0.0"),
        ("{recipes: [cifar10-resnet18-at_moe-n1], variants: {a: {model: {num_experts: 4}}}}", "variants: a: .* model.num_experts"),
    ],
)
def test_settings_that_contradict_the_name_of_a_recipe_are_refused(write_sweep, text, message):
    with pytest.raises(UserError, match=message):
        plan(read_sweep(write_sweep(text)))


def test_a_variant_may_leave_out_an_ingredient(write_sweep):
    runs = plan(
        read_sweep(write_sweep("{recipes: [cifar10-resnet18-advmoe-plus], variants: {last: {training: {ema: 0}}}, seeds: 1}"))
    )
    assert [(run.name, run.config.training.ema) for run in runs] == [("cifar10-resnet18-advmoe-plus-last-s0", 0.0)]


def test_file(write_sweep):
    runs = plan(read_sweep(write_sweep(FILE)))
    cells = ("at_dense", "advmoe-r0.25", "advmoe")
    assert [run.name for run in runs] == [f"fashion-mnist-resnet18-{cell}-s{seed}" for seed in (3, 7) for cell in cells]
    moe = runs[1].config
    assert (moe.training.epochs, moe.training.lr, moe.model.num_experts, moe.model.model_scale) == (2, 0.05, 4, 0.25)
    assert moe.attack.epsilon == 8 / 255


def test_every_model_scale_has_a_separate_name_and_is_used_exactly(write_sweep):
    text = "methods: [advmoe]\nmodel_scales: [0.123456789, 0.123457, 0.00001, 1]\nseeds: 1\n"
    runs = plan(read_sweep(write_sweep(text)))
    assert [run.config.model.model_scale for run in runs] == [0.123456789, 0.123457, 0.00001, 1]
    names = [run.name.removeprefix("cifar10-resnet18-advmoe-") for run in runs]
    assert names == ["r0.123456789-s0", "r0.123457-s0", "r0.00001-s0", "r1-s0"]
    assert runs[0].label.endswith(" r0.123456789")


def test_command_line_comes_over_the_file(write_sweep):
    runs = plan(read_sweep(write_sweep(FILE)), settings={"training": {"epochs": 9}})
    assert {(run.config.training.epochs, run.config.training.lr) for run in runs} == {(9, 0.05)}


def test_unknown_texts_data_sets_and_settings_are_refused():
    with pytest.raises(
        UserError, match="--only vgg: no run has this in its name; the first of 15 is 'cifar10-resnet18-at_dense-s0"
    ):
        plan(read_sweep("figA2"), ["vgg"])
    with pytest.raises(UserError, match="unknown dataset 'cifar': did you mean cifar10"):
        plan(read_sweep("figA2"), dataset="cifar")
    with pytest.raises(UserError, match=r"command line: training\.epochs must be at least 1"):
        plan(read_sweep("figA2"), settings={"training": {"epochs": 0}})


def test_experts_variants_and_recipes(write_sweep):
    text = """
    grids:
    - {methods: [at_dense, advmoe], num_experts: [1, 2], seeds: 1, settings: {model: {width: 8}}}
    - recipes: [cifar10-resnet18-at_moe-n1]
      seeds: [0, 5]
      variants: {shared: {model: {norms: shared}}, lr: {training: {lr: 0.05}}}
    preset: [pgd_10]
    """
    sweep = read_sweep(write_sweep(text))
    runs = {run.name.removeprefix("cifar10-resnet18-"): run.config for run in plan(sweep)}
    cells = ["at_dense-s0", "advmoe-n1-s0", "advmoe-s0", "at_moe-n1-shared-s0", "at_moe-n1-lr-s0"]
    assert list(runs) == [*cells, "at_moe-n1-shared-s5", "at_moe-n1-lr-s5"]
    assert [runs[cell].model.num_experts for cell in cells] == [2, 1, 2, 1, 1]
    assert [runs[cell].model.width for cell in cells] == [8, 8, 8, None, None]
    assert (runs["at_moe-n1-shared-s5"].model.norms, runs["at_moe-n1-lr-s5"].training.lr) == ("shared", 0.05)
    assert sweep.preset == ("pgd_10",)


def test_a_run_of_two_grids_counts_once_and_two_runs_of_one_name_are_refused(write_sweep):
    same = "grids: [{methods: [advmoe], seeds: 1}, {methods: [advmoe, at_moe], seeds: 2}]"
    assert len(plan(read_sweep(write_sweep(same)))) == 4
    other = "grids: [{methods: [advmoe], seeds: 1}, {methods: [advmoe], seeds: 1, settings: {training: {lr: 0.2}}}]"
    with pytest.raises(UserError, match="two runs with different settings have the name cifar10-resnet18-advmoe-s0"):
        plan(read_sweep(write_sweep(other)))


def test_a_data_set_that_a_user_added(write_sweep, monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", DATASETS["fashion-mnist"])
    grids = plan(read_sweep(write_sweep("{datasets: [stripes], seeds: 1}"))), plan(read_sweep("figA2"), ["s0"], dataset="stripes")
    for runs in grids:
        assert {run.config.data.dataset for run in runs} == {"stripes"}
        assert runs[-1].name == "stripes-resnet18-advmoe-s0"
    back = plan(read_sweep(write_sweep("{datasets: [stripes], seeds: 1}")), dataset="cifar10")
    assert back[-1].name == "cifar10-resnet18-advmoe-s0"


def test_the_data_set_of_a_demo_recipe_cannot_be_replaced(write_sweep):
    with pytest.raises(UserError, match="--dataset: the recipe demo-advmoe has a data set that cannot be replaced"):
        plan(read_sweep(write_sweep("recipes: [demo-advmoe]")), dataset="cifar10")


# Runs that would be planned twice, or too often


def test_a_variant_may_repeat_the_settings_of_another(write_sweep):
    """As in a sweep over a value with a base that has the default one."""
    variants = "{base: {}, lr0.1: {training: {lr: 0.1}}, lr0.05: {training: {lr: 0.05}}}"
    assert len(plan(read_sweep(write_sweep(f"recipes: [cifar10-resnet18-advmoe]\nvariants: {variants}\nseeds: 1")))) == 3


def test_two_names_of_the_same_run_are_refused(write_sweep):
    for names in ("cifar10-resnet18-advmoe, cifar10-resnet18-advmoe-r0.5", "cifar10-resnet18-advmoe-n2, cifar10-resnet18-advmoe"):
        first, second = names.split(", ")
        with pytest.raises(UserError, match=f"^{first} and {second} are the same run$"):
            plan(read_sweep(write_sweep(f"recipes: [{names}]")))
    variants = "variants: {few: {training: {epochs: 2}}, many: {training: {epochs: 3}}}"
    alike = plan(read_sweep(write_sweep(f"methods: [advmoe]\nseeds: 1\n{variants}")), settings={"training": {"epochs": 1}})
    assert len(alike) == 2  # the command line made them the same, perhaps to try the sweep out


def test_the_number_of_runs_is_limited_with_seeds_of_the_command_line_too(write_sweep):
    many = read_sweep(write_sweep("methods: [at_moe, advmoe]\nbackbones: [resnet18, vgg16_bn]\nnum_experts: [1, 2, 3]\nseeds: 1"))
    with pytest.raises(UserError, match=r"^plans 12000 runs, at most 10000 are allowed; give fewer seeds$"):
        plan(many, seeds=1000)
