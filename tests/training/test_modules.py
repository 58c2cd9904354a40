"""What a step asks of a model's modules and weights, and of how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qft.training.modules import AskedLess


def begun() -> tuple[Any, AskedLess]:
    model, callback = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))), AskedLess()
    model[0].requires_grad_(False)
    callback.on_train_begin(None, None, None, model=model)
    return model, callback


def test_whatever_does_not_train_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, callback = begun()
    assert not any(module.training for module in model.eval().modules())
    assert all(module.training for module in model.train().modules())
    model[1][1].eval()
    assert all(module.training for module in model.train().modules())
    asked: list[Any] = []
    monkeypatch.setattr(nn.Linear, "train", lambda *args: asked.append(args))
    assert model.train() is model
    assert not asked
    callback.on_train_end(None, None, None, model=model)
    model.train()
    assert asked


def test_no_gradient_outlives_its_step() -> None:
    model, callback = begun()
    for forgets in (True, False):
        model(torch.ones(1, 2)).sum().backward()
        model.zero_grad(set_to_none=forgets)
        assert (model[1][0].weight.grad is None) is forgets
    assert model[1][0].weight.grad.count_nonzero() == 0
    callback.on_train_end(None, None, None, model=model)
    assert not {"train", "zero_grad"} & vars(model).keys()
