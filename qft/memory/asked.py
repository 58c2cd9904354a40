"""What a step and an evaluation ask of a model, on tensors whose contents are of no interest."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from qft.memory.distilled_loss import divergence
from qft.memory.fused_loss import COUNTS, FusedLoss
from qft.memory.work import Batch, Work


def masked(model: Any) -> bool:
    """Whether padding is masked in training; see qft.memory.unmasked."""
    return bool(getattr(innermost(model).config, "output_router_logits", False))


def answer(model: nn.Module, batch: Batch, work: Work) -> None:
    """All tokens at once, where they come one by one: their keys and values are kept, and logits of the last alone."""
    inputs = _inputs(model, batch, work)
    keeps = "logits_to_keep" in inspect.signature(innermost(model).forward).parameters
    with torch.no_grad(), _autocast(work.mixed):
        model(**inputs, use_cache=True, **{"logits_to_keep": 1} if keeps else {})


def innermost(model: Any) -> Any:
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return base


def _inputs(model: nn.Module, batch: Batch, work: Work) -> dict[str, Any]:
    if batch.seen:
        return {name: value.clone() for name, value in batch.seen.inputs.items()}
    ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
    padded = batch.padded and (not model.training or work.masks or masked(model))
    mask = torch.cat([torch.ones_like(ids[:, 1:]), ids[:, :1]], dim=1) if padded else None
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(model: nn.Module, batch: Batch, work: Work) -> torch.Tensor:
    """As the Trainer computes it: under autocast, what the model returns in float32."""
    inputs, labels = _inputs(model, batch, work), torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
    smoothing = work.label_smoothing_factor if model.training else 0.0
    if not smoothing:
        inputs |= {"labels": labels, "num_items_in_batch": torch.ones((), dtype=torch.int64)}
        if isinstance(innermost(model).forward, FusedLoss):
            inputs[COUNTS] = (batch.tokens - 1,) * batch.rows
    with _autocast(work.mixed):
        out = model(**inputs)
    if work.mixed is not None and "logits" in out:
        out["logits"] = out["logits"].float()
    if smoothing:
        smoothed: torch.Tensor = LabelSmoother(smoothing)(out, labels, shift_labels=True)
        return smoothed
    loss: torch.Tensor = out["loss"]
    return loss


def distilled(model: nn.Module, batch: Batch, work: Work) -> torch.Tensor:
    """As the Trainer computes it, of as many tokens as are learnt."""
    inputs, places = _inputs(model, batch, work), torch.zeros(batch.learnt, dtype=torch.int64)

    def ask() -> Any:
        with _autocast(work.mixed):
            out = model(**inputs, use_cache=False)
        if work.mixed is not None:
            out["logits"] = out["logits"].float()
        return out

    return divergence(model, ask, (places, places), places, work.distill)


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
