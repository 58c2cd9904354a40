"""A model without contents whose every tensor is counted, and a machine that is not there: the paths that a GPU takes,
on tensors that say they are on a CPU, since torch needs no GPU to compute their shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from qft.memory.attention import attention
from qft.memory.softmax import Tail
from qft.quant.experts import owner
from qft.quant.hold import Scheme
from qft.quant.stacked import Stacked

HALF = (torch.float16, torch.bfloat16)
IN_FLOAT32 = [
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "group_norm", "rms_norm", "cosine_similarity", "nll_loss", "cross_entropy",
    "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "logsumexp",
    "dist", "renorm", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "norm",
]  # fmt: skip
"""What autocast computes in float32 on a GPU (aten/src/ATen/autocast_mode.h), and, for the most part, not on a CPU."""
SLOWER = 1.5
"""What attention's kernels take of the time for as much work, beside products of large matrices (H100, H200)."""


class _Sdpa(str):
    """Of another name, and torch's own to models that ask whether it is (Falcon)."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "sdpa" or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


UNPADDED = _Sdpa("qft-unpadded")
"""Attention by torch's own kernels, of rows that fill their batch."""


def _functions(names: Collection[str]) -> frozenset[Callable[..., Any]]:
    places = (torch, torch.Tensor, functional)
    return frozenset(getattr(place, name) for place in places for name in names if hasattr(place, name))


class OnGpu(TorchFunctionMode):
    """Attention by a GPU's kernels, and its autocast, in `dtype`; None: there is no autocast."""

    def __init__(self, dtype: torch.dtype | None, count: Callable[[float], None], *, again: bool = False) -> None:
        """`count` is told the work of attention, in multiplications with additions of a product of matrices that takes
        as long; `again`: what it computes was computed before."""
        super().__init__()
        self.dtype, self.count, self.again = dtype, count, again
        self.in_float32 = _functions(IN_FLOAT32)

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
        return func(*args, **kwargs)

    def entered_again(self) -> tuple[Any, Any]:
        """Contexts of a checkpointed block's first run and of its second: a backward pass enters no mode by itself."""
        return nullcontext(), OnGpu(self.dtype, self.count, again=True)


class NoLayerDropped(TorchFunctionMode):
    """LayerDrop (arXiv:1909.11556) draws a number for each block, and leaves out those whose number is small: none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1.0 if func is torch.rand and args == ([],) else func(*args, **(kwargs or {}))


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


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        wants = isinstance(value, torch.Tensor) and value.dtype in (*HALF, torch.float32) and value.dtype != dtype
        return value.to(dtype) if wants else value

    return tree_map(cast, values)


@contextmanager
def peft_sees_autocast(mixed: bool) -> Iterator[None]:
    """peft asks whether there is autocast on a GPU, wherever its tensors are."""
    was = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", mixed)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", was)


def gradient_on_gpu(z: torch.Tensor, classes: torch.Tensor, tail: Tail) -> torch.Tensor:
    """As softmax.gradient_in_place, whose kernel makes nothing but the losses."""
    return torch.empty(len(z), dtype=torch.float32)


def set_attention(model: PreTrainedModel, asked: str, *, padded: bool) -> None:
    """Have the model, for which that attention is asked, choose its masks as it does where it can look at them: a mask
    without contents says nothing."""
    config = model.config
    config._attn_implementation = asked
    if asked.startswith(("flash", "flex")) or (asked == "sdpa" and not padded):
        AttentionInterface.register(UNPADDED, ALL_ATTENTION_FUNCTIONS["sdpa"])
        AttentionMaskInterface.register(UNPADDED, _mask_of_full_rows)
        config._attn_implementation = UNPADDED


def _mask_of_full_rows(*args: Any, **kwargs: Any) -> Any:
    """None where a kernel's own causal order will do, else torch's mask: of a window that is shorter than the rows, or
    where the model computes with it."""
    window, length = kwargs.get("local_size"), kwargs.get("kv_length", 0)
    if kwargs.get("allow_is_causal_skip", True) and (window is None or length < window):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs | {"allow_is_causal_skip": False})


def hold(model: PreTrainedModel, scheme: Scheme) -> None:
    """Put the stand-ins of quantized layers into the unquantized `model`, as the scheme holds them."""
    for name in sorted(scheme.holds(model) or ()):
        parent = model.get_submodule(name.rpartition(".")[0])
        module: Any = model.get_submodule(name)
        columns, rows = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        layer = scheme.stand_in(rows, columns, module.bias)
        if layer is not None:
            layer.weight.requires_grad_(False)
            setattr(parent, name.rpartition(".")[2], layer)
    for name, weight in [(name, model.get_parameter(name)) for name in scheme.holds_experts(model)]:
        setattr(model.get_submodule(owner(name)), name.rpartition(".")[2], scheme.stacked(weight))
    for bits in ("8bit", "4bit"):  # as from_pretrained says; peft's layers ask
        if scheme.name == bits:
            setattr(model, f"is_loaded_in_{bits}", True)


def fill(model: nn.Module, scheme: Scheme, note: Callable[[torch.Tensor, nn.Module, bool], None]) -> None:
    """Replace meta tensors by those that are counted; `note` is told each, whose it is, and whether it is trained."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = module._parameters
        if isinstance(module, scheme.stand_in_class):
            # Its layer asks the weight how it is held; what holds it are other bytes.
            module.__dict__["weight"] = own.pop("weight")
            size = scheme.weight_bytes(module.out_features, module.in_features) or 0
            module.__dict__["packed"] = torch.empty(size, dtype=torch.uint8)
            note(module.packed, module, False)
        for name, parameter in own.items():
            if isinstance(parameter, Stacked):
                view = parameter.view_of
                store = scheme.stack(torch.empty(view.store.shape, dtype=parameter.dtype))
                made[id(parameter)] = nn.Parameter(Stacked(replace(view, store=store)), requires_grad=False)
                for part in made[id(parameter)].view_of.store.tensors.values():
                    note(part, module, False)
            elif parameter is not None and id(parameter) not in made:
                filled = torch.zeros(parameter.shape, dtype=parameter.dtype)
                note(filled, module, parameter.requires_grad)
                made[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
            own[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                filled = torch.zeros(buffer.shape, dtype=buffer.dtype)
                note(filled, module, False)
                module._buffers[name] = filled
