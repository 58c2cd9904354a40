"""What a model that rounds learns from itself unrounded: the loss, without a second model in memory."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss

from qft.data.template import IGNORED
from qft.quant.rounded import without_rounding


def distilled_loss(
    model: Any, inputs: Mapping[str, Any], tokens: torch.Tensor | int | None, share: float = 1.0
) -> torch.Tensor:
    """KL divergence from the same model without rounding and adapter, in nats: the sum over the learnt tokens of
    `inputs`, by their number in the whole step (`tokens`; None: of these inputs). Of a `share` below one the rest is
    the loss of the tokens themselves."""
    asked = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
    labels = inputs["labels"][:, 1:]
    at = (labels != IGNORED).nonzero(as_tuple=True)
    total = divergence(model, partial(model, **asked), at, labels[at], share)
    return total / (len(at[0]) if tokens is None else tokens)


def divergence(
    model: Any, ask: Callable[[], Any], at: tuple[torch.Tensor, ...], answers: torch.Tensor, share: float
) -> torch.Tensor:
    """The sum over the places `at`, rows and positions, in front of the tokens `answers`; `ask` runs the model."""
    with torch.no_grad(), without_rounding(model):
        model.eval()
        taught = log_softmax(ask().logits[:, :-1][at].float(), -1)
        model.train()
    learnt = log_softmax(ask().logits[:, :-1][at].float(), -1)
    total = share * kl_div(learnt, taught, reduction="sum", log_target=True)
    return total + (1 - share) * nll_loss(learnt, answers, reduction="sum") if share < 1 else total
