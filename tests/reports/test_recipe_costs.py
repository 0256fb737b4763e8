from advmoe.recipes import RECIPES
from advmoe.reports import recipe_costs
from advmoe.reports.recipe_costs import TABLE, counted, lines, recipe_cost


def test_table_is_what_is_counted():
    assert TABLE.read_text().splitlines() == lines(RECIPES)


def test_listed_recipes_are_not_counted_and_changed_ones_are(monkeypatch):
    config = RECIPES["demo-advmoe"]
    wider = config.replace(model=config.model.replace(width=32))
    assert recipe_cost("demo-advmoe", wider) == counted(wider) != recipe_cost("demo-advmoe", config)
    monkeypatch.setattr(recipe_costs, "counted", None)
    assert recipe_cost("demo-advmoe", config) == recipe_costs.table()["demo-advmoe"]
