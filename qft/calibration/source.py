"""The unquantized model that a calibration starts from: the plan's own, or a run's base with its adapter merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qft.calibration.streamed import Read
from qft.checkpoint.weights import read_weights
from qft.model.load import load_base
from qft.model.target import load_target, parse_target
from qft.plan import ModelPlan

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    plan: ModelPlan
    run: Path | None = None
    """The run whose adapter is merged into them; None: they are those of plan.checkpoint."""

    def read(self) -> Read:
        """From a parameter's name to its value."""
        if self.run is None:
            return read_weights(self.plan.checkpoint.with_weights())
        weights: dict[str, torch.Tensor] = self.load(device="cpu").state_dict()
        return weights.__getitem__

    def load(self, device: str | None = None) -> Any:
        """The whole model, ready to run."""
        if self.run is None:
            return load_base(self.plan)
        section = self.plan.recipe.model
        changes = {
            "device": device or section.device,
            "dtype": self.plan.dtype,
            "attn_implementation": section.attn_implementation,
        }
        target = parse_target(f"{self.run}@merged", adapter=None, data=None)
        target = replace(target, loaded=target.loaded.having(model=changes))
        return load_target(target, target.plan())
