"""What is decided, before anything is loaded. The only place where an `auto` is decided."""

from qft.plan.model import ModelPlan, Shape, plan_model
from qft.plan.training import Plan, make_plan

__all__ = ["ModelPlan", "Plan", "Shape", "make_plan", "plan_model"]
