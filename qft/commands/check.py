"""`qft check`: Recipe -> Plan, and no further."""

from __future__ import annotations

from typing import Any

from qft.commands.calibrate import find_plan
from qft.measure.harness import asked_tasks, check_tasks
from qft.plan import make_plan
from qft.recipe import LoadedRecipe

__all__ = ["planned"]


def planned(loaded: LoadedRecipe) -> dict[str, Any]:
    """Facts of the training, and under `calibration` those of the calibration; of what the recipe has sections for."""

    check_tasks(asked_tasks(loaded))
    calibrates = loaded.recipe.calibrate is not None
    facts: dict[str, Any] = {}
    encoded = None
    if not calibrates or any(loaded.has(section) for section in ("train", "adapter", "quant")):
        plan = make_plan(loaded)
        facts, encoded = plan.facts(), plan.data
    return facts | ({"calibration": find_plan(loaded, encoded)[0].facts()} if calibrates else {})
