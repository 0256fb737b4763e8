"""`advmoe profile` and `advmoe recipes`."""

import json

import pytest
from refused_commands import refused

from advmoe.cli.main import main


def run_command(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


TINY = ("profile", "--recipe", "demo-advmoe", "--width", "4")


def test_totals_by_default_and_layers_on_request(capsys):
    assert len(run_command(capsys, *TINY).splitlines()) == 5
    lines = run_command(capsys, *TINY, "--layers").splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["stem.0", "blocks.0.conv1", "blocks.0.conv1.router.linear"]
    assert lines[-1].startswith("against dense")


def test_json_layers_sum_to_the_totals(capsys):
    profile = json.loads(run_command(capsys, *TINY, "--layers", "--json"))
    assert "layers" not in json.loads(run_command(capsys, *TINY, "--json"))
    for name in ("params", "gmacs_ideal", "gmacs_executed"):
        assert sum(layer[name] for layer in profile["layers"]) == pytest.approx(profile[name])


def test_profile_json_has_the_four_figures(capsys):
    assert main(["profile", "--recipe", "cifar10-resnet18-advmoe", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"params", "gmacs_ideal", "gmacs_executed", "gmacs_dense"}
    assert figures["gmacs_ideal"] == pytest.approx(0.27 * figures["gmacs_dense"], rel=0.02)


def test_profile_takes_overrides(capsys):
    assert main(["profile", "--recipe", "cifar10-resnet18-at_small_dense", "--model-scale", "0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gmacs_ideal"] == pytest.approx(0.021, abs=0.001)


def test_sparse_says_what_is_counted(capsys):
    assert "compact network" in run_command(capsys, "profile", "--recipe", "demo-at_sparse", "--width", "4")
    assert "compact network" not in run_command(capsys, *TINY)


def test_paper_marks_cells(capsys):
    out = run_command(capsys, "profile", "--paper")
    assert "3.36 is 36 % less than 5.25, not 38 %" in out
    rows = json.loads(run_command(capsys, "profile", "--paper", "--json"))
    assert len(rows) == 36
    assert sum(not row["possible"] for row in rows) == 16


@pytest.mark.parametrize("more", [("--recipe", "demo-advmoe"), ("--layers",), ("--num-experts", "4")])
def test_paper_takes_nothing_else(capsys, more):
    assert "--paper takes no recipe" in refused(capsys, "profile", "--paper", *more)


def test_recipes_are_filtered_by_part_of_their_names(capsys):
    lines = run_command(capsys, "recipes", "cifar10-wrn28_10-adv").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("cifar10")]
    assert names == [f"cifar10-wrn28_10-advmoe{suffix}" for suffix in ("", "-r0.2", "-r0.8", "-steps10", "-plus", "-official")]
    assert [row["name"] for row in json.loads(run_command(capsys, "recipes", "cifar10-wrn28_10-adv", "--json"))] == names
    assert "-pgd_at" in lines[-1]


def test_no_such_recipe_is_one_line(capsys):
    assert "no listed recipe has 'resnet81' in its name: did you mean resnet18" in refused(capsys, "recipes", "resnet81")


def test_unlisted_names_are_recipes(capsys):
    arguments = ("profile", "--recipe", "cifar10-resnet18-advmoe-r0.25-n4-pgd_at", "--width", "8", "--json")
    profile = json.loads(run_command(capsys, *arguments))
    assert profile["gmacs_ideal"] < 0.15 * profile["gmacs_dense"]
