"""Whether examples may share a row, and how many tokens there are in one."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from qft.memory.packed import cannot_pack
from qft.recipe import Recipe
from qft.recipe.rules import Problem


def packing_problems(recipe: Recipe, skeleton: PreTrainedModel) -> Iterator[Problem]:
    """What of a packed recipe the model cannot do."""
    reason = cannot_pack(skeleton) if recipe.data.is_packed else None
    for field in ("packing", "padding_free"):
        if reason and getattr(recipe.data, field):
            yield f"data.{field}", f"{reason}: set it to false"
