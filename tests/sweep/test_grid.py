"""Sweep files and the paper's grids."""

import pytest

from advmoe.errors import UserError
from advmoe.sweep.grid import read_sweep


def test_an_empty_file_is_the_grid_of_five_methods(write_sweep):
    (empty,), (paper,) = (read_sweep(what).grids for what in (write_sweep("{}"), "figA2"))
    assert (empty.names(), empty.seeds, len(empty.names())) == (paper.names(), paper.seeds, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [advmoe]", "unknown field 'method': did you mean methods"),
        ("methods: [advmo]", "methods: unknown name 'advmo': did you mean advmoe"),
        ("methods: advmoe", "methods must be a list of names, not 'advmoe'"),
        ("backbones: [resnet]", "backbones: unknown name 'resnet': did you mean resnet18"),
        ("datasets: [cifar]", "datasets: unknown name 'cifar': did you mean cifar10"),
        ("model_scales: [2]", "model_scales must be a list of numbers in (0, 1], not [2]"),
        ("seeds: 0", "seeds must be a number of seeds from 1 to 1000, or a list of so many, not 0"),
        ("settings: {training: {epoch: 1}}", "unknown field 'training.epoch': did you mean epochs"),
        ("settings: {training: {epochs: 0}}", "epochs must be at least 1, not 0"),
        ("settings: {train: {epochs: 1}}", "unknown field 'train': did you mean training"),
        ("settings: {training: 3}", "training must be a section with fields, not 3"),
        ("settings: 3", "settings must be a mapping of sections, not 3"),
        ("seeds: 1001", "seeds must be a number of seeds from 1 to 1000, or a list of so many, not 1001"),
        (f"seeds: [0{', 1' * 1000}]", "or a list of so many, not [0, 1, 1, 1, 1, 1, ...]"),
        ("seeds: [1, 9223372036854775808]", "seeds must be whole numbers in [0, 2**63), not 9223372036854775808"),
        ("seeds: [-1]", "seeds must be whole numbers in [0, 2**63), not -1"),
        ("settings: {schema: 3}", "settings: unknown field 'schema': there is attack, data, model, training"),
        ("settings: {seed: 3}", "seed is set by seeds, not here"),
        ("settings: {model: {model_scale: 0.2}}", "model.model_scale is set by model_scales, not here"),
        ("settings: {runtime: {threads: 2}}", "runtime is set by --device"),
        ("num_experts: [0]", "num_experts must be a list of whole numbers from 1 to 1000, not [0]"),
        ("num_experts: [1]\nsettings: {model: {num_experts: 4}}", "model.num_experts is set by num_experts, not here"),
        ("num_experts: [1]\nvariants: {a: {model: {num_experts: 4}}}", "variants: a: model.num_experts is set by num_experts"),
        ("recipes: [cifar10-resnet18-advmo]", "did you mean advmoe"),
        ("recipes: [demo-advmoe]\nmethods: [advmoe]", "recipes excludes methods"),
        ("variants: {a/b: {}}", "variants: 'a/b' is not a name of letters, digits, '_', '.' and '-'"),
        ("variants: {a: {training: {epoch: 1}}}", "unknown field 'training.epoch': did you mean epochs"),
        ("variants: {a: {seed: 3}}", "seed is set by seeds, not here"),
        ("variants: [a]", "variants must be a mapping of names to settings, not ['a']"),
        ("grids: 3", "grids must be a list of grids, not 3"),
        ("grids: [3]", "grids[0] must be a mapping of fields, not 3"),
        ("grids: [{method: [advmoe]}]", "grids[0]: unknown field 'method': did you mean methods"),
        ("grids: [{}]\nmethods: [advmoe]", "unknown field 'methods' beside grids"),
        ("preset: 3", "preset must be quick, standard, full or a list of attacks, not 3"),
        ("[1, 2]", "holds no mapping of fields"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files_are_refused_with_what_would_be_right(write_sweep, text, message):
    with pytest.raises(UserError) as error:
        read_sweep(write_sweep(text))
    assert message in str(error.value)
    assert "grid.yaml" in str(error.value)


@pytest.mark.parametrize("field", ["methods", "model_scales", "settings", "settings: {training"])
def test_nested_aliases_do_not_make_the_message_long(write_sweep, field):
    levels = ["- &a0 [x, x]"] + [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = "datasets:\n" + "\n".join(levels) + f"\n{field}: *a11" + ("}" if "{" in field else "")
    with pytest.raises(UserError) as error:
        read_sweep(write_sweep(text))
    assert len(str(error.value)) < 400


def test_too_many_runs_are_refused(write_sweep):
    scales = ", ".join(f"0.{number}" for number in range(1000, 9000))
    with pytest.raises(UserError, match=r"plans 72000 runs, at most 10000 are allowed; some lists are too long"):
        read_sweep(write_sweep(f"methods: [at_moe, at_moe, advmoe, at_sparse]\nseeds: 3\nmodel_scales: [{scales}]"))


def test_unknown_sweeps_are_refused():
    with pytest.raises(
        UserError, match=r"unknown sweep 'fig8', neither a file .* nor a table or figure of the paper: did you mean fig7"
    ):
        read_sweep("fig8")
    with pytest.raises(UserError, match=r"no-such\.yaml: cannot be read"):
        read_sweep("no-such.yaml")


def test_names_given_twice_count_once(write_sweep):
    text = f"methods: [{', '.join(['advmoe'] * 5000)}]\nbackbones: [{', '.join(['resnet18'] * 5000)}]\nseeds: 1\n"
    (grid,) = read_sweep(write_sweep(text)).grids
    assert (grid.names(), grid.size) == (["cifar10-resnet18-advmoe"], 1)


def test_old_names_in_settings_are_read(write_sweep):
    (grid,) = read_sweep(write_sweep("{settings: {data: {picture_size: 64}}}")).grids
    assert grid.settings == {"data": {"image_size": 64}}


# A list of recipes that is empty


def test_an_empty_list_of_recipes_is_refused(write_sweep):
    with pytest.raises(UserError, match=r"recipes must be a list of names, not \[\]"):
        read_sweep(write_sweep("recipes: []"))
