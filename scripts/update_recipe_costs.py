"""Write the table of recipes' costs anew: python scripts/update_recipe_costs.py."""

from advmoe.recipes import RECIPES
from advmoe.reports.costs import recipe_table
from advmoe.reports.recipe_list import TABLE

TABLE.write_text("\n".join(recipe_table(RECIPES)) + "\n")
