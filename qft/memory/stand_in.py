"""A model without contents whose every tensor is counted, and that takes the paths which it takes on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from qft.memory.softmax import Tail
from qft.quant.experts import owner
from qft.quant.hold import Scheme
from qft.quant.stacked import Stacked


class _Sdpa(str):
    """Of another name, and torch's own to models that ask whether it is (Falcon)."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "sdpa" or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


UNPADDED = _Sdpa("qft-unpadded")
"""Attention by torch's own kernels, of rows that fill their batch."""


class NoLayerDropped(TorchFunctionMode):
    """LayerDrop (arXiv:1909.11556) draws a number for each block, and leaves out those whose number is small: none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1.0 if func is torch.rand and args == ([],) else func(*args, **(kwargs or {}))


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
