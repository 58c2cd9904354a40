"""The loss that keeps the experts of a mixture evenly used: transformers' own, asked for, and watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qft.documents.training import BalanceLoss


class BalanceWatch:
    """What the model's balance loss was in training, where it has one."""

    def __init__(self, model: Any) -> None:
        base = getattr(model, "get_base_model", lambda: model)()
        self.coefficient = float(getattr(base, "router_aux_loss_coef", None) or 0.0)
        self.batches = 0
        self.first = self.last = self.total = torch.zeros(())
        base.register_forward_hook(self._note)

    def _note(self, model: nn.Module, _: Any, output: Any) -> None:
        loss = getattr(output, "aux_loss", None)
        if not model.training or not isinstance(loss, torch.Tensor):
            return
        self.last = loss.detach().float()
        self.first, self.total = (self.last, self.last) if not self.batches else (self.first, self.total + self.last)
        self.batches += 1

    def document(self) -> BalanceLoss | None:
        """None: there was none."""
        if not self.batches:
            return None
        mean = float(self.total) / self.batches
        return BalanceLoss(
            coefficient=self.coefficient,
            first=float(self.first),
            last=float(self.last),
            mean=mean,
            micro_batches=self.batches,
        )
