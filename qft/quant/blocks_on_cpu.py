"""bitsandbytes on a CPU takes each row of a 4-bit weight to begin with a block of its own, and so dequantizes it by the
wrong scales where rows are no whole number of blocks (seen in 0.50): such a weight is given to it as one row."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import bitsandbytes  # noqa: F401  # registers what is mended here
import torch
from torch.library import Library, get_kernel


def _mend() -> Any:
    """For this process. Returns what holds it, None where bitsandbytes has no kernel of its own for a CPU."""
    try:
        own = get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    except RuntimeError:
        return None

    def dequantize(
        keys: Any, codes: Any, absmax: Any, blocksize: int, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        whole = shape[-1] % blocksize == 0
        asked = list(shape) if whole else [math.prod(shape)]
        found: torch.Tensor = own.call_boxed(keys, codes, absmax, blocksize, kind, asked, dtype)
        return found if whole else found.reshape(shape)

    library = Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is replaced is meant
        library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
    return library


MENDED = _mend()
"""Once it is gone, so is what it registered."""
