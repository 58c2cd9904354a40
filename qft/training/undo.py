"""What has to be put back before a step can be made again: what was drawn, and what the optimizer did."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Drawn:
    """How far the random numbers of Python, NumPy and torch have been drawn, of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw the same numbers again."""
        python, numpy, host = self._states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Undo:
    """Takes back a step of `optimizer` that was cut off.

    The state of an optimizer is made in its first step, which is where memory runs out: for that one, and for no other,
    the weights are copied to the host. An update that is cut off later can be made again if it had changed nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        self._optimizer = optimizer
        self._before = list(self._marks())
        self._copies: list[torch.Tensor] | None = None
        if first and not optimizer.state:
            try:
                self._copies = [weight.detach().to("cpu", copy=True) for weight in self._weights()]
            except (RuntimeError, MemoryError):
                self._copies = None  # without room for them nothing is lost but the second attempt

    @torch.no_grad()
    def take_back(self) -> bool:
        """Whether weights and state are as they were before the step."""
        if self._copies is not None:
            for weight, copy in zip(self._weights(), self._copies, strict=True):
                weight.copy_(copy)
            self._optimizer.state.clear()
            return True
        return list(self._marks()) == self._before

    def _weights(self) -> Iterator[torch.Tensor]:
        return (weight for group in self._optimizer.param_groups for weight in group["params"])

    def _marks(self) -> Iterator[Any]:
        """What a step changes first: the versions of tensors, and the counts of optimizers whose kernels torch does not
        see."""
        yield from (weight._version for weight in self._weights())
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield value._version
                elif isinstance(value, int | float):
                    yield value
