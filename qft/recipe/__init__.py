"""What is asked: YAML -> Recipe."""

from qft.recipe.data import Source
from qft.recipe.load import LoadedRecipe, dump, json_schema, load
from qft.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "Source", "dump", "json_schema", "load"]
