"""Blocks that hand on what they are given, so that what is before, between and behind them runs without them."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.checkpoint.bypassed import Answering
from qft.errors import ModelError, first_line

Call = tuple[tuple[Any, ...], dict[str, Any]]
WIDEST = 3
"""Results of a block."""


class Passing:
    """A model whose blocks are so, from now on. Sequences are taken one row at a time."""

    def __init__(self, model: PreTrainedModel, blocks: Iterable[nn.Module], device: str) -> None:
        """Raises ModelError for a model whose blocks need more of one another than hidden states."""
        self.model, self.device = model, device
        self.calls: dict[int, list[Call]] = {}
        """By how many tokens the hidden states are of, what each block is given beside them."""
        self.entered: torch.Tensor | None = None
        """Hidden states [1, tokens, hidden] that the first block was given."""
        self.leave: torch.Tensor | None = None
        """What each block gives back; None: what it is given."""
        self._width = 0
        """Of the tuple that a block returns, whose first is what is handed on; 0: it returns that alone."""
        for number, block in enumerate(blocks):
            block.forward = self._passing(number, next(iter(signature(block.forward).parameters)))
        self._find_width()

    def forward(self, ids: torch.Tensor) -> Any:
        """Of token ids [1, tokens]."""
        if self.leave is None:
            self.calls[ids.shape[1]] = []
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False)

    def _find_width(self) -> None:
        """A model fails on another one than its blocks return, wherever it first meets it."""
        for self._width in range(WIDEST + 1):
            try:
                logits = self.forward(torch.zeros(1, 2, dtype=torch.long, device=self.device)).logits
            except ModelError:
                raise
            except Exception as error:
                problem = first_line(error)
            else:
                if logits.shape[:2] == (1, 2):
                    return
                problem = f"it makes {list(logits.shape)} of two tokens"
        text = "cannot be run one at a time, without the others in memory"
        raise ModelError(f"the blocks of {type(self.model).__name__} {text}: {problem}")

    def _passing(self, number: int, first: str) -> Callable[..., Any]:
        """What a block does whose first argument has that name."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, *more = args or (kwargs.pop(first),)
            if any(each is self for each in (*more, *kwargs.values())):
                text = "are given more of those before than hidden states, and cannot be run one at a time"
                raise ModelError(f"the blocks of {type(self.model).__name__} {text}")
            if self.leave is None:
                self.entered = hidden if number == 0 else self.entered
                self.calls[hidden.shape[1]].append((tuple(more), kwargs))
            behind = hidden if self.leave is None else self.leave
            return (behind, *[self] * (self._width - 1)) if self._width else behind

        return forward


def passing_problem(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> str | None:
    """Why that cannot be done with `model`, which is without contents; None if it can, or if that does not show so."""
    try:
        with torch.no_grad(), Answering():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:
        return None
    try:
        with Answering():
            Passing(model, blocks, "meta")
    except ModelError as error:
        return str(error)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return None
