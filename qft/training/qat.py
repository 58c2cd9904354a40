"""What quantization-aware training adds to a training: when rounding begins, and what the unrounded model teaches."""

from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import TrainerCallback

from qft.data.template import IGNORED
from qft.model.rounded import switch_of, without_rounding


class RoundingStart(TrainerCallback):
    """Trains without rounding until `steps` optimizer steps were made. What is evaluated is rounded from the start."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        switch = switch_of(model)
        assert switch is not None
        switch.in_training = state.global_step >= self.steps


def distilled_loss(
    model: Any, inputs: dict[str, Any], tokens: torch.Tensor | int | None, share: float = 1.0
) -> torch.Tensor:
    """KL divergence from the same model without rounding and adapter, in nats: the sum over the learnt tokens of
    `inputs`, by their number in the whole step (`tokens`; None: of these inputs). Of a `share` below one the rest is
    the loss of the tokens themselves."""
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    at = inputs["labels"][:, 1:] != IGNORED
    with torch.no_grad(), without_rounding(model):
        model.eval()
        taught = log_softmax(model(**asked, use_cache=False).logits[:, :-1][at].float(), -1)
        model.train()
    learnt = log_softmax(model(**asked, use_cache=False).logits[:, :-1][at].float(), -1)
    total = share * kl_div(learnt, taught, reduction="sum", log_target=True)
    if share < 1:
        total = total + (1 - share) * nll_loss(learnt, inputs["labels"][:, 1:][at], reduction="sum")
    return total / (at.sum() if tokens is None else tokens)
