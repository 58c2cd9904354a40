"""Rows that come to numbers that are none, told by their places before anything is made of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qft.data.sources import some_places
from qft.errors import NonFiniteError
from qft.measure.likelihood import Verification

Rows = Sequence[Mapping[str, Any]]
Place = Callable[[int, int], str]
"""Of a row, by its source and its number."""
REMEDY = "Look at what they hold, or give another model.dtype"


def require_finite_states(states: Iterable[torch.Tensor], rows: Rows, place: Place) -> None:
    """Raise NonFiniteError for rows whose hidden states in the unquantized model are not finite."""
    _require(map(is_finite, states), rows, place, "the unquantized model")


def require_finite_windows(states: Iterable[torch.Tensor]) -> None:
    """Raise NonFiniteError for windows over the calibration rows, which have no place of their own."""
    if bad := [str(number) for number, state in enumerate(states, 1) if not is_finite(state)]:
        text = f"what windows {some_places(bad)} of the calibration rows come to in the unquantized model"
        raise NonFiniteError(f"{text} is not finite. {REMEDY}")


def require_finite(verification: Verification, rows: Rows, place: Place) -> Verification:
    """The verification. Raises NonFiniteError for rows that either model has no loss of."""
    before, after = verification.before, verification.after
    _require(np.isfinite(before.nll), rows, place, "the unquantized model")
    far = after.mean_kl(np.arange(len(rows))[:, None])
    _require(np.isfinite(after.nll) & np.isfinite(far), rows, place, "the quantized model")
    return verification


def is_finite(states: torch.Tensor) -> bool:
    return bool(torch.isfinite(states).all())


def _require(fine: Iterable[Any], rows: Rows, place: Place, model: str) -> None:
    if bad := [place(row["source"], row["row"]) for row, good in zip(rows, fine, strict=True) if not good]:
        raise NonFiniteError(f"the loss of {some_places(bad)} is not finite in {model}. {REMEDY}")
