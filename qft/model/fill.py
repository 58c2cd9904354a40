"""Parts of a model without contents, given those that its files have."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.errors import ModelError

Read = Callable[[str], torch.Tensor]
"""From the name of a tensor in the model to its value."""
Hold = Callable[[nn.Module, str, torch.Tensor], torch.Tensor | None]
"""From a module, the name of one of its parameters and its value on the device to the parameter that holds it; None: it
is held as it is."""


def fill(
    model: PreTrainedModel,
    module: nn.Module,
    prefix: str,
    read: Read,
    place: tuple[str, torch.dtype],
    *,
    skip: str = "\0",
    hold: Hold = lambda *_: None,
    take: Callable[[str, torch.Tensor], nn.Parameter | None] = lambda *_: None,
) -> None:
    """Read what the files have of `module`, which `model` calls `prefix`, and compute the buffers that they have not.
    `place` is device and dtype; what begins with `skip` is left. `take` makes a parameter of its name and shape without
    its value; None: it is read. Raises ModelError for another shape."""
    persistent = module.state_dict(keep_vars=True)
    owned = [*module.named_parameters(), *((name, b) for name, b in module.named_buffers() if name in persistent)]
    kept: Mapping[str, torch.dtype] = model._get_dtype_plan(place[1])
    for name, meta in owned:
        if name.startswith(skip):
            continue
        dtype = _dtype(prefix + name, kept, place[1]) if meta.is_floating_point() else None
        owner, _, key = name.rpartition(".")
        filled: torch.Tensor | None = take(prefix + name, meta)
        if filled is None:
            value = read(prefix + name).to(place[0], dtype)
            filled = hold(module.get_submodule(owner), key, value)
        if filled is None and value.shape != meta.shape:
            raise ModelError(f"{prefix}{name}: is {list(value.shape)} and should be {list(meta.shape)}")
        if filled is None:
            filled = nn.Parameter(value, requires_grad=False) if isinstance(meta, nn.Parameter) else value
        filled._is_hf_initialized = True  # type: ignore[attr-defined]  # below, it is to be left alone
        setattr(module.get_submodule(owner), key, filled)
    _compute_buffers(model, module, place[0], skip)


def _dtype(name: str, kept: Mapping[str, torch.dtype], otherwise: torch.dtype) -> torch.dtype:
    """As transformers has it: some modules stay in float32."""
    patterns = ((re.escape(part).replace(r"\*", ".*"), dtype) for part, dtype in kept.items())
    return next((dtype for pattern, dtype in patterns if re.search(pattern, name)), otherwise)


def _compute_buffers(model: PreTrainedModel, module: nn.Module, device: str, skip: str) -> None:
    """By the class of the innermost model that a part is of: a tower is another's than the model around it."""
    owners = {part: own for own in model.modules() if isinstance(own, PreTrainedModel) for part in own.modules()}
    for name, part in module.named_modules():
        computed: set[Any] = part._non_persistent_buffers_set
        if computed and not f"{name}.".startswith(skip):
            for key in computed:
                part._buffers[key] = torch.empty_like(part._buffers[key], device=device)
            owners.get(part, model)._init_weights(part)
