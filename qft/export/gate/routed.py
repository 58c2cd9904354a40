"""Which experts each token went to in the model as trained, and an artifact that sends them to the same ones.

Scores of a router that nearly tie change places by as little as products round, and the token's prediction with them:
of a mixture that is what was trained, a comparison would tell of that alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.memory.asked import innermost
from qft.quant.experts import expert_parameters, owner

Given = tuple[torch.Tensor, torch.Tensor]
"""Numbers of the experts that tokens go to, and by how much each counts: both [tokens, experts of a token]."""


@dataclass
class Choices:
    """By module of experts, what it was given in each pass, on the host; of modules that are not given the numbers of
    experts, nothing."""

    given: dict[str, list[Given]] = field(default_factory=dict)

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """While entered, what `model` chooses."""

        def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            if found := _given(args, kwargs):
                self.given.setdefault(name, []).append((found[0].cpu(), found[1].cpu()))

        with _hooked(model, note):
            yield

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[Callable[[], float]]:
        """While entered, `model` is given the same passes, and goes by these choices. Yields a function that tells the
        share of them that it would have made itself."""
        same, passes = list[float](), {name: iter(own) for name, own in self.given.items()}

        def follow(name: str, _: nn.Module, args: Any, kwargs: Any) -> Any:
            own = _given(args, kwargs)
            if own is None:
                return None
            numbers, weights = (t.to(o.device, o.dtype) for t, o in zip(next(passes[name]), own, strict=True))
            same.append(float((own[0][:, :, None] == numbers[:, None]).any(-1).float().mean()))
            put = {id(own[0]): numbers, id(own[1]): weights}
            return tuple(put.get(id(v), v) for v in args), {key: put.get(id(v), v) for key, v in kwargs.items()}

        with _hooked(model, follow):
            yield lambda: sum(same) / max(len(same), 1)


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    base: PreTrainedModel = innermost(model)
    names = dict.fromkeys(owner(name) for name in expert_parameters(base))
    hooks = [base.get_submodule(n).register_forward_pre_hook(partial(hook, n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _given(args: Any, kwargs: Any) -> Given | None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim == 2]
    numbers = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
    if numbers is None:
        return None
    weights = next((t for t in tensors if t.is_floating_point() and t.shape == numbers.shape), None)
    return None if weights is None else (numbers, weights)
