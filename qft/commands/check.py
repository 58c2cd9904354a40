"""`qft check`: Recipe -> Plan, and no further."""

from qft.commands.calibrate import find_plan
from qft.documents.plan import CalibrationCheck, PlanDocument
from qft.measure.harness import asked_tasks, check_tasks
from qft.model.handover import foreseen, require_exports
from qft.plan import make_plan
from qft.recipe import LoadedRecipe


def planned(loaded: LoadedRecipe) -> PlanDocument | CalibrationCheck:
    """The plan of the training, and within it that of the calibration; of what the recipe has sections for."""
    check_tasks(asked_tasks(loaded))
    calibrates = loaded.recipe.calibrate is not None
    if calibrates and not any(loaded.has(section) for section in ("train", "adapter", "quant")):
        return CalibrationCheck(calibration=find_plan(loaded)[0].document())
    plan = make_plan(loaded)
    require_exports(plan)
    calibration = find_plan(loaded, plan.data)[0].document() if calibrates else None
    return plan.document().model_copy(update={"calibration": calibration, "exports": foreseen(plan)})
