"""Write the table of recipes' costs anew: python scripts/update_recipe_costs.py."""

from advmoe.files import write_atomically
from advmoe.recipes import RECIPES
from advmoe.reports.costs import recipe_table
from advmoe.reports.recipe_list import TABLE

write_atomically(TABLE, "\n".join(recipe_table(RECIPES)) + "\n")
