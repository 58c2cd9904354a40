"""What is asked: YAML -> Recipe."""

from qft.recipe.load import LoadedRecipe, dump, json_schema, load
from qft.recipe.schema import Recipe
from qft.recipe.training import Source

__all__ = ["LoadedRecipe", "Recipe", "Source", "dump", "json_schema", "load"]
