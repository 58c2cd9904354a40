"""The unquantized model that a calibration starts from: the plan's own, or a run's base with its adapter merged."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qft.calibration.streamed import StreamedModel
from qft.files import atomic_folder
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.model.target import require_same_base
from qft.plan import ModelPlan, plan_folder
from qft.run.folder import Run


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    plan: ModelPlan
    work: Path
    """Where the model is written if it must lie in files, and does not."""
    run: Path | None = None
    """The run whose adapter is merged into them; None: they are those of plan.checkpoint."""

    @cached_property
    def weights(self) -> MergedWeights:
        """Raises ModelError for an adapter that cannot be merged, or not into this base."""
        adapter = Run(self.run).adapter if self.run else None
        if adapter:
            require_same_base(adapter, self.plan)
        return MergedWeights(self.plan, adapter, self.plan.dtype, "original")

    def stream(self) -> StreamedModel:
        """The model, one block at a time; merged as it is read."""
        checkpoint = replace(self.plan.checkpoint, config=self.weights.config)
        return StreamedModel(replace(self.plan, checkpoint=checkpoint), self.weights.reader(), self.weights.layout())

    def folder(self) -> Path:
        """The model as safetensors, with its tokenizer."""
        if not self.run and not self.plan.checkpoint.gguf_file and not self.plan.checkpoint.packed:
            return self.plan.checkpoint.with_weights().folder
        whole = self.work / "unquantized"
        if not whole.exists():
            with atomic_folder(whole) as folder:
                self.weights.write(folder)
        return whole

    def load(self) -> Any:
        """The whole model, ready to run."""
        if not self.run:
            return load_base(self.plan)
        return load_base(plan_folder(self.folder(), self.plan.recipe.model, self.plan.dtype))
