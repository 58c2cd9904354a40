"""A quantizer of the user's own: quant.plugin's code decides how a layer is held, and no other knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qft.quant.hold.base import Scheme
from qft.quant.hold.plugin import load_plugin
from qft.recipe import Recipe
from qft.recipe.section import Problem
from qft.recipe.training import QuantSection


class Custom(Scheme):
    """What a plugin makes of unquantized weights."""

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Custom:
        """Runs the file. Raises MissingError, or ModelError for what it lacks."""
        plugin = load_plugin(Path(str(quant.plugin)))
        return cls(plugin.method, dtype, (*heads, *quant.named_skips), plugin)

    def config(self) -> dict[str, Any]:
        return self.plugin.config(list(self.skipped)) if self.plugin else {}

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        if self.plugin and (reason := self.plugin.untrainable(self.config())):
            yield "quant.plugin", reason
