import pytest
from docs_blocks.performance import recipe_table

from advmoe.errors import UserError
from advmoe.recipes import RECIPES
from advmoe.reports.recipe_list import TABLE, chosen_recipes, recipe_lines, recipe_rows


def test_the_stored_table_is_up_to_date():
    assert TABLE.read_text() == recipe_table(RECIPES)


def test_recipes_are_listed_with_settings_and_cost():
    lines = recipe_lines(chosen_recipes(RECIPES, "cifar10-wrn28_10-at_"))
    assert len(lines) == 1 + 3 + 3 * 5
    (line,) = [line for line in lines if line.startswith("cifar10-wrn28_10-at_sparse-r0.8 ")]
    settings = ["100", "+", "100", "128", "TRADES,", "2", "x", "5/255", "in", "8/255", "23,349,606", "3.3547", "-36", "%"]
    assert line.split()[1:] == settings


def test_all_recipes_are_listed():
    assert [line.split()[0] for line in recipe_lines(RECIPES)[1:]] == list(RECIPES)
    assert {name.split("-")[0] for name in RECIPES} == {"demo", "cifar10", "cifar100", "tinyimagenet", "imagenet"}


def test_recipe_rows_hold_the_configuration():
    (row,) = recipe_rows({"demo-advmoe": RECIPES["demo-advmoe"]})
    assert row.config.attack.epsilon == 0.1
    assert 0.2 * row.gmacs_dense < row.gmacs_ideal < 0.3 * row.gmacs_dense


def test_unknown_part_of_a_name():
    with pytest.raises(UserError, match=r"no listed recipe has 'cifr10' in its name: did you mean cifar10.*; any DATASET-B"):
        chosen_recipes(RECIPES, "cifr10")
