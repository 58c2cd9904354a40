"""What quantization-aware training adds to a training: when rounding begins."""

from typing import Any

from transformers import TrainerCallback

from qft.errors import ModelError
from qft.quant.rounded import measure_scales, switch_of
from qft.quant.rounding_state import RoundingState, state_of
from qft.recipe.training import QuantSection


class RoundingSchedule(TrainerCallback):
    """Trains without rounding until quant.fake_quant_after_steps optimizer steps were made, and looks for the largest
    activations until quant.freeze_observers_after_steps were. What is evaluated is rounded from the start. `start`: the
    step of the Trainer's that is the first of these."""

    def __init__(self, quant: QuantSection, start: int) -> None:
        self.quant, self.start = quant, start

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        switch, learnt, done = switch_of(model), state_of(model), state.global_step - self.start
        assert switch is not None
        switch.in_training = done >= self.quant.fake_quant_after_steps
        if learnt is None:
            return
        if done and done == self.quant.fake_quant_after_steps:
            measure_scales(model)
        learnt.observe(done < self.quant.freeze_observers_after_steps)
        if done == self.quant.freeze_observers_after_steps:
            require_observed(learnt)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if learnt := state_of(model):
            learnt.observe(False)  # what is computed again to measure it is no activation of the training


def require_observed(learnt: RoundingState) -> None:
    """Raise ModelError for a layer that was given no input while the range of inputs was looked for."""
    if name := learnt.unobserved():
        text = "was given no input (or zeros alone) in the steps that look for the largest"
        raise ModelError(f"{name}: {text}: raise quant.freeze_observers_after_steps, or name it in quant.skip_modules")
