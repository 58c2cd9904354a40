"""What quantization-aware training adds to a training: when rounding begins, and what the unrounded model teaches."""

from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import TrainerCallback

from qft.data.template import IGNORED
from qft.errors import ModelError
from qft.quant.rounded import measure_scales, switch_of, without_rounding
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


def distilled_loss(model: Any, inputs: dict[str, Any], tokens: torch.Tensor | int | None) -> torch.Tensor:
    """KL divergence from the same model without rounding and adapter, in nats: the sum over the learnt tokens of
    `inputs`, by their number in the whole step (`tokens`; None: of these inputs)."""
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    at = inputs["labels"][:, 1:] != IGNORED
    with torch.no_grad(), without_rounding(model):
        model.eval()
        taught = log_softmax(model(**asked, use_cache=False).logits[:, :-1][at].float(), -1)
        model.train()
    learnt = log_softmax(model(**asked, use_cache=False).logits[:, :-1][at].float(), -1)
    total = kl_div(learnt, taught, reduction="sum", log_target=True)
    return total / (at.sum() if tokens is None else tokens)
