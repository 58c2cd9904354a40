"""Weights that are no numbers, which would be trained on, quantized or exported without a word."""

from collections.abc import Iterable

import torch

from qft.checkpoint.conversion import FLOATS
from qft.errors import ModelError


def require_finite(where: object, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ModelError for the first tensor, by its name, that holds NaN or infinity."""
    for name, tensor in tensors:
        if not _is_finite(tensor.detach()):
            raise ModelError(f"{where}: {name} holds NaN or infinity; copy or download the weights again")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    # Extremes are NaN if one value is, and need no copy as isfinite does; torch has them for these dtypes alone.
    extremes = torch.stack(torch.aminmax(tensor if tensor.dtype in FLOATS else tensor.float()))
    return bool(extremes.isfinite().all())
