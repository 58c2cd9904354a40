"""Models to train whose base waits elsewhere, or is resident, and whether the two learn the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.model.offload import load_offloaded, look_up_on_host, offloading
from qft.plan import Plan


@contextmanager
def made(plan: Plan, folder: Path) -> Iterator[Any]:
    """The model to train, as the plan has it."""
    with offloading(plan.model, folder) as offload:
        torch.manual_seed(0)
        base = load_offloaded(plan.model, offload) if offload else load_base(plan.model)
        model = attach_adapter(base, plan, offload.bring if offload else None)
        if offload:
            look_up_on_host(model, offload.device)
        yield model


def learnt(plan: Plan, folder: Path) -> dict[str, Any]:
    """The adapter as it starts; losses and gradients of two steps, and a loss without gradients."""
    found: dict[str, Any] = {}
    with made(plan, folder) as model:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found["start"] = {name: p.detach().clone() for name, p in trainable.items()}
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable.values():
            parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.device)
        if plan.recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(80, device=plan.model.device.kind).reshape(2, 40) + 3
        found["losses"] = []
        for _ in range(2):
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            with torch.no_grad():
                found["losses"] += [loss.item(), model.eval()(input_ids=ids, labels=ids).loss.item()]
        found["gradients"] = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one["losses"] == other["losses"]
    for part in ("start", "gradients"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, other[part][name], rtol=0, atol=0)
    return len(one["gradients"]) > 0
