"""Kernels put into tiny models, on tensors that a CPU holds: their references compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qft.kernels import LINEAR, MLP, NORM, ROTARY, Applied, apply, attach, float8, layer

KINDS = (MLP, LINEAR, NORM, ROTARY)


@contextmanager
def everywhere() -> Iterator[None]:
    """Fused on a CPU, and in float32 and float64, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "_on_gpu", lambda x: True)
        for module, dtypes in ((layer, "HALF"), (float8, "SUMMED_TO")):
            patch.setattr(module, dtypes, (torch.bfloat16, torch.float16, torch.float32, torch.float64))
        yield


def adapted(model: nn.Module, dtype: torch.dtype | None = torch.float64, **changes: Any) -> Any:
    """With adapters that are not zero, and norms and biases that somebody trained; None: each in its own dtype."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            nn.init.normal_(parameter, float("norm" in name and "bias" not in name), 0.1)
    made: Any = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.05)
    return (made if dtype is None else made.to(dtype)).train()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(stacks, key=lambda stack: len(list(stack.modules())))


def fused(model: Any, mixed: torch.dtype | None = None, kinds: Sequence[str] = KINDS) -> Applied:
    """Everything that can be."""
    return apply(model, blocks_of(model), kinds, mixed)


def gradients(model: Any, ids: torch.Tensor, mixed: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Of all that is trained, and the logits."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast(ids.device.type, dtype=mixed or torch.bfloat16, enabled=mixed is not None):
        logits = model(input_ids=ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.device)
    (logits * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def largest_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, of one tensor."""
    assert found.keys() == wanted.keys()
    errors = [(found[n].double() - wanted[n].double()).norm() / wanted[n].double().norm() for n in wanted]
    return float(torch.stack(errors).max())


def total_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, of all tensors as one: gradients of queries and keys that hardly matter are noise in 16 bits."""
    assert found.keys() == wanted.keys()
    wrong = sum(float((found[name].double() - value.double()).square().sum()) for name, value in wanted.items())
    return (wrong / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5
