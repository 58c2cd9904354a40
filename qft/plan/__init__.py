"""What is decided, before anything is loaded. The only place where an `auto` is decided."""

from qft.plan.calibration import CalibrationPlan, plan_calibration, plan_layers
from qft.plan.model import ModelPlan, plan_folder, plan_model, refuse
from qft.plan.training import Plan, make_plan, plan_adapter, with_skip_modules

__all__ = ["CalibrationPlan", "ModelPlan", "Plan", "make_plan", "plan_adapter", "plan_calibration"]
__all__ += ["plan_folder", "plan_layers", "plan_model", "refuse", "with_skip_modules"]
