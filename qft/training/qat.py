"""What quantization-aware training adds to a training: when rounding begins."""

from typing import Any

from transformers import TrainerCallback

from qft.model.rounded import switch_of


class RoundingStart(TrainerCallback):
    """Trains without rounding until `steps` optimizer steps were made. What is evaluated is rounded from the start."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        switch = switch_of(model)
        assert switch is not None
        switch.in_training = state.global_step >= self.steps
