"""Functions that autocast, or a GPU's kernel, makes something else of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from qft.memory.ledger import Ledger
from qft.memory.on_gpu import OnGpu

Function = Callable[[Tensor], Tensor]
Found = tuple[torch.dtype, int]

FUNCTIONS: dict[str, Function] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax asked for in float32": lambda x: functional.softmax(x, dim=-1, dtype=torch.float32),
    "softmax in 16 bits": lambda x: torch.softmax(x, -1, x.dtype),
    "log_softmax": lambda x: functional.log_softmax(x, dim=-1),
    "sum": lambda x: x.sum(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "norm": lambda x: x.norm(dim=-1),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "square": torch.square,
    "power": lambda x: x**2,
    "reciprocal": lambda x: 1 / x,
    "softplus": functional.softplus,
    "mean": lambda x: x.mean(-1),
    "relu": functional.relu,
    "silu": functional.silu,
    "product": lambda x: x * x,
}
ROWS = 64


def stood_in(function: Function, dtype: torch.dtype, size: int, *, mixed: bool = True) -> Found:
    """The dtype of what it makes of [ROWS, size / ROWS] numbers of `dtype`, and the bytes of the worst moment of both
    passes."""
    ledger = Ledger(lambda _, label: label)
    ledger.part = "both"
    with FakeTensorMode(), ledger, OnGpu(dtype if mixed else None, lambda _: None):
        x = torch.empty(ROWS, size // ROWS, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            out = function(x)
        made = out.dtype
        gradient = torch.empty_like(out)
        out.backward(gradient)  # type: ignore[no-untyped-call]
    return made, ledger.peaks()["both"].total


def measured(function: Function, dtype: torch.dtype, size: int) -> Found:
    """The same of a GPU, under autocast."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.zeros(ROWS, size // ROWS, dtype=dtype, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        out = function(x)
    made = out.dtype
    out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    return made, torch.cuda.max_memory_allocated() - before
