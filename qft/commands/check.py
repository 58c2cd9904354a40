"""`qft check`: Recipe -> Plan, and no further."""

import torch

from qft.commands.calibrate import find_plan
from qft.data.shown import shown_rows
from qft.distributed.asked import processes
from qft.documents.plan import CalibrationCheck, PlanDocument
from qft.machine.device import absent_gpu
from qft.measure.harness import asked_tasks, check_tasks
from qft.model.handover import foreseen, require_exports
from qft.plan import make_plan, refuse
from qft.plan.gpus import plan_gpus
from qft.plan.model import require_device
from qft.recipe import LoadedRecipe


def planned(
    loaded: LoadedRecipe, show: int = 0, gpu: int | None = None, many: tuple[int, int] | None = None
) -> PlanDocument | CalibrationCheck:
    """The plan of the training, and within it that of the calibration; of what the recipe has sections for. With the
    first `show` rows of each source; of the training on a GPU of `gpu` bytes, if they are given, or on `many` of them:
    of a node, and nodes."""
    check_tasks(asked_tasks(loaded))
    calibrate = loaded.recipe.calibrate
    if calibrate and not any(loaded.has(section) for section in ("train", "adapter", "quant")):
        alone = find_plan(loaded)[0]
        rows = shown_rows(alone.data.prepared, alone.model.tokenizer, show)
        return CalibrationCheck(calibration=alone.document(), shown=rows)
    if gpu and loaded.recipe.model.device == "cpu":
        refuse(loaded, [("model.device", "cpu, and --gpu asks what the training takes of a GPU; set it to auto")])
    device = absent_gpu(gpu) if gpu else None
    many = many or (None if gpu else _here(loaded))
    if many:
        plan, gpus = plan_gpus(loaded, device or require_device(loaded), *many)
    else:
        plan, gpus = make_plan(_alone(loaded) if gpu else loaded, device), None
    require_exports(plan)
    shown = shown_rows(plan.data, plan.model.tokenizer, show) if show else []
    calibration = find_plan(loaded, plan.data)[0] if calibrate else None
    if calibration and calibration.calibrate.data:
        shown += shown_rows(calibration.data.prepared, calibration.model.tokenizer, show)
    told = {
        "calibration": calibration and calibration.document(),
        "exports": foreseen(plan),
        "gpus": gpus,
        "shown": shown,
    }
    return plan.document().model_copy(update=told)


def _alone(loaded: LoadedRecipe) -> LoadedRecipe:
    """On one GPU, whatever the recipe says of several."""
    return loaded.having(distributed={"strategy": "none", "gpus": 1, "nodes": 1})


def _here(loaded: LoadedRecipe) -> tuple[int, int] | None:
    """GPUs of this node and nodes, where `qft train` would use several."""
    nodes, asked = loaded.recipe.distributed.nodes, loaded.recipe.distributed.gpus
    if nodes > 1:
        return (torch.cuda.device_count() or 1 if asked == "auto" else asked), nodes
    count = processes(loaded)
    return (count, 1) if count > 1 else None
