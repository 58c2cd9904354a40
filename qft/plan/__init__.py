"""What is decided, before anything is loaded. The only place where an `auto` is decided."""

from qft.plan.calibration import CalibrationPlan, find_blocks, plan_calibration
from qft.plan.model import ModelPlan, Shape, plan_model
from qft.plan.training import Plan, make_plan

__all__ = [
    "CalibrationPlan",
    "ModelPlan",
    "Plan",
    "Shape",
    "find_blocks",
    "make_plan",
    "plan_calibration",
    "plan_model",
]
