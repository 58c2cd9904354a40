"""What the Trainer asks of all modules and weights in each step, asked of those that it concerns: with adapters there
are some thousand, and what is launched next waits for them (docs/performance.md)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from qft.distributed.world import world


class AskedLess(TrainerCallback):
    """While a model is trained by one process, which leaves its modules and weights the objects that they are."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if world().size == 1:
            ask_less(model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        for name in ("train", "zero_grad"):
            vars(model).pop(name, None)


def ask_less(model: nn.Module) -> None:
    """Have model.train() look whether all modules are training already, and model.zero_grad() at the weights that are
    trained."""
    modules, trained = list(model.modules()), [p for p in model.parameters() if p.requires_grad]
    kind: Any = type(model)

    def train(mode: bool = True) -> Any:
        return model if mode and all(module.training for module in modules) else kind.train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            kind.zero_grad(model, set_to_none)
            return
        for parameter in trained:
            parameter.grad = None

    vars(model).update(train=train, zero_grad=zero_grad)
