"""What torch does on a GPU and not on a CPU: attention's kernels, autocast, dropout, softmax. On tensors that say they
are on a CPU, since torch needs no GPU to compute their shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from qft.memory.attention import attention

HALF = (torch.float16, torch.bfloat16)
IN_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm group_norm
    rms_norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate
    cross_entropy normalize softmin square __pow__ __rpow__ __rdiv__
"""
"""What autocast computes in float32 on a GPU (ATen/autocast_mode.h), and, for the most part, not on a CPU; in the last
line, what is made of such."""
MAKES_FLOAT32 = "softmax log_softmax prod cumprod cumsum sum norm vector_norm matrix_norm"
"""What of it makes float32, unless it is told a dtype, of what it is given as it is."""
SLOWER = 1.5
"""What attention's kernels take of the time for as much work, beside products of large matrices (H100, H200)."""


def _functions(names: str) -> frozenset[Callable[..., Any]]:
    places = (torch, torch.Tensor, functional, torch.special, torch.linalg)
    return frozenset(getattr(place, name) for place in places for name in names.split() if hasattr(place, name))


class OnGpu(TorchFunctionMode):
    """Attention by a GPU's kernels, and its autocast, in `dtype`; None: there is no autocast."""

    in_float32, makes_float32 = _functions(IN_FLOAT32), _functions(MAKES_FLOAT32)
    softmax, log_softmax = _functions("softmax"), _functions("log_softmax")

    def __init__(self, dtype: torch.dtype | None, count: Callable[[float], None], *, again: bool = False) -> None:
        """`count` is told the work of attention, in multiplications with additions of a product of matrices that takes
        as long; `again`: what it computes was computed before."""
        super().__init__()
        self.dtype, self.count, self.again = dtype, count, again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, mixed = kwargs or {}, self.dtype is not None and torch.is_autocast_enabled("cpu")
        if func is functional.scaled_dot_product_attention:
            rows, heads, tokens, size = args[0].shape
            # Of two products half is masked; the backward pass has five, and is counted with the first forward pass.
            self.count(SLOWER * rows * heads * tokens * tokens * size * (1.0 if self.again else 3.5))
            return attention(*_cast(args, self.dtype) if mixed else args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if mixed and func in self.in_float32:
            args, kwargs = _cast(args, torch.float32), _cast(kwargs, torch.float32)
        if mixed and func in self.makes_float32 and _dtype_asked(args, kwargs) is None and _is_half(args, kwargs):
            kwargs = kwargs | {"dtype": torch.float32}
        if func in self.softmax or func in self.log_softmax:
            return _softmax(*args, **kwargs, writes_product=func in self.softmax)
        return func(*args, **kwargs)

    def entered_again(self) -> tuple[Any, Any]:
        """Contexts of a checkpointed block's first run and of its second: a backward pass enters no mode by itself."""
        return nullcontext(), OnGpu(self.dtype, self.count, again=True)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        wants = isinstance(value, torch.Tensor) and value.dtype in (*HALF, torch.float32) and value.dtype != dtype
        return value.to(dtype) if wants else value

    return tree_map(cast, values)


def _dtype_asked(args: Any, kwargs: Any) -> torch.dtype | None:
    given = (value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype))
    return next(given, None)


def _is_half(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.dtype in HALF for value in (*args, *kwargs.values()))


class _Softmax(torch.autograd.Function):
    """On the way back, softmax writes gradient · output down before it sums it, and log_softmax does not
    (aten/src/ATen/native/cuda/SoftMax.cu)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype, writes_product: bool) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=dtype)
        ctx.save_for_backward(out)
        ctx.given, ctx.writes_product = x.dtype, writes_product
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (out,) = ctx.saved_tensors
        product = torch.empty_like(out) if ctx.writes_product else None
        found = torch.empty(out.shape, dtype=ctx.given)
        del product
        return found, None, None


def _softmax(*args: Any, writes_product: bool, **kwargs: Any) -> torch.Tensor:
    """Stands in for softmax and log_softmax; float16 alone becomes float32 without a copy."""
    x = args[0] if args else kwargs["input"]
    dtype = _dtype_asked(args, kwargs) or x.dtype
    x = x if (x.dtype, dtype) == (torch.float16, torch.float32) else x.to(dtype)
    out: torch.Tensor = _Softmax.apply(x, dtype, writes_product)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    """As a GPU's kernel drops numbers, which keeps a byte for each (aten/src/ATen/native/cuda/Dropout.cu)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradient)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002
    """Stands in for torch.nn.functional.dropout."""
    if inplace or not (training and 0 < p < 1):
        return functional.dropout(input, p, training, inplace)
    out: torch.Tensor = _Dropped.apply(input)  # type: ignore[no-untyped-call]
    return out
