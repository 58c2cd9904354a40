"""Training without a mask: what stands behind a token says nothing about it where attention is causal, so padding on
the right needs none, and kernels that take none are faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

REAL, PADDED = 8, 4
SAME, ALIKE = 1e-3, 0.05
"""Largest relative difference of logits that one kernel gives, and that two kernels do."""


def needs_no_mask(model: Any) -> bool:
    """Whether logits and loss of rows that are padded on the right are the same without attention_mask, whatever they
    are padded with; tried on the loaded model. A loss that balances experts counts what is masked, and needs it."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return False
    training = model.training
    try:
        with torch.no_grad():
            return _agree(model.eval())
    except Exception:  # a model's code can be anything
        return False
    finally:
        model.train(training)


def _agree(model: Any) -> bool:
    count = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(REAL + PADDED, device=model.device) * 7 + 1).repeat(2, 1)
    ids[1, REAL:] += 3
    mask = (torch.arange(REAL + PADDED, device=model.device) < REAL).long().repeat(2, 1)
    ids, labels = ids % count, (ids % count).masked_fill(mask == 0, -100)
    without, masked = (model(input_ids=ids, attention_mask=each, labels=labels) for each in (None, mask))
    one, other = without.logits[:, :REAL].float()
    whole = masked.logits[:, :REAL].float()
    losses = [float(each.loss) for each in (without, masked)]
    return (
        difference(one, other) <= SAME
        and difference(without.logits[:, :REAL].float(), whole) <= ALIKE
        and abs(losses[0] - losses[1]) <= 1e-2 * abs(losses[1])
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, by norms."""
    return float((one - other).norm() / other.norm())


@contextmanager
def one_row_each() -> Iterator[dict[str, Any]]:
    """Without a mask, transformers waits for the device to see whether any row is several in one: none is here.

    Gives what else the model is told: nothing."""
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is None:
        yield {}
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield {}
    finally:
        setattr(masking_utils, name, found)
