"""Write the table of recipes' costs anew: python scripts/update_recipe_costs.py."""

from advmoe.recipes import RECIPES
from advmoe.reports.recipe_costs import TABLE, lines

TABLE.write_text("\n".join(lines(RECIPES)) + "\n")
