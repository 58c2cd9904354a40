"""What the attention kernels of a GPU allocate: shapes alone, for tensors without contents.

Of torch's scaled_dot_product_attention: with no mask, 16-bit numbers and heads of at most 256 it takes flash attention
(arXiv:2307.08691); with a mask, the memory-efficient one (arXiv:2112.05682); else the product of queries and keys is
written out. Shapes of q, k, v: [rows, heads, tokens, head size]; k and v may have fewer heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

FLASH_LARGEST_HEAD = 256
FLASH_ROWS, FLASH_COLUMNS = 128, 32
"""What flash attention's backward pass rounds tokens and head size up to."""
EFFICIENT_ROWS = 32
"""What the memory-efficient kernel rounds the tokens of its sums up to."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands in for torch.nn.functional.scaled_dot_product_attention."""
    if query.dtype == torch.float32 and attn_mask is None:
        return _apply(_Efficient, query, *_repeated(query, key, value))
    if attn_mask is None:
        kernel = _Flash if query.shape[-1] <= FLASH_LARGEST_HEAD else _Efficient
        return _apply(kernel, query, key, value)
    if attn_mask.dtype == torch.bool:  # which becomes what is added
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype)
    return _apply(_Efficient, query, *_repeated(query, key, value), attn_mask)


def _apply(kernel: Any, *tensors: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = kernel.apply(*tensors)
    return made


def _repeated(query: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values with as many heads as there are of queries."""
    return [x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in others]


def _by_tokens(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An output that lies as [rows, tokens, heads, head size]."""
    rows, heads, tokens, _ = query.shape
    return torch.empty(rows, tokens, heads, value.shape[-1], dtype=query.dtype).transpose(1, 2)


def _as_query(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One that lies as the queries do. What lies by heads the model copies, to lie by tokens, and both are kept."""
    rows, heads, tokens, _ = query.shape
    if query.stride(1) < query.stride(2):
        return _by_tokens(query, value)
    return torch.empty(rows, heads, tokens, value.shape[-1], dtype=query.dtype)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = _as_query(query, value)
        sums = torch.empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        rows, heads, tokens, size = query.shape
        taken = [torch.empty(rows, heads, _up(tokens, FLASH_ROWS), dtype=torch.float32)]
        padded = (rows, heads, _up(tokens, FLASH_ROWS), _up(size, FLASH_COLUMNS))
        taken.append(torch.empty(padded, dtype=torch.float32))
        gradients = tuple(torch.empty_like(each) for each in (query, key, value))
        if key.shape[1] != heads:  # one of each query's head, before they are summed
            taken += [torch.empty(query.shape, dtype=key.dtype) for _ in range(2)]
        del taken
        return gradients


class _Efficient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = _by_tokens(query, value)
        rows, heads, tokens, _ = query.shape
        sums = torch.empty(rows, heads, _up(tokens, EFFICIENT_ROWS), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([] if mask is None else [mask]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, sums, *_ = ctx.saved_tensors
        taken = torch.empty(sums.shape, dtype=torch.float32)
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        del taken
        return (*gradients, *([None] if len(ctx.needs_input_grad) > len(gradients) else []))
