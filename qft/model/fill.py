"""Parts of a model without contents, given those that its files have."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress

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
    _compute_buffers(model, module, place[0])
    persistent = module.state_dict(keep_vars=True)
    parameters = module.named_parameters(remove_duplicate=False)
    owned = [*parameters, *((name, b) for name, b in module.named_buffers() if name in persistent)]
    kept: Mapping[str, torch.dtype] = model._get_dtype_plan(place[1])
    done: dict[int, torch.Tensor] = {}
    for name, meta in owned:
        if name.startswith(skip):
            continue
        owner, _, key = name.rpartition(".")
        if id(meta) not in done:
            dtype = _dtype(prefix + name, kept, place[1]) if meta.is_floating_point() else None
            filled: torch.Tensor | None = take(prefix + name, meta)
            if filled is None:
                value = read(prefix + name).to(place[0], dtype)
                filled = hold(module.get_submodule(owner), key, value)
            if filled is None and value.shape != meta.shape:
                raise ModelError(f"{prefix}{name}: is {list(value.shape)} and should be {list(meta.shape)}")
            if filled is None:
                filled = nn.Parameter(value, requires_grad=False) if isinstance(meta, nn.Parameter) else value
            done[id(meta)] = filled
        setattr(module.get_submodule(owner), key, done[id(meta)])


def _dtype(name: str, kept: Mapping[str, torch.dtype], otherwise: torch.dtype) -> torch.dtype:
    """As transformers has it: some modules stay in float32."""
    patterns = ((re.escape(part).replace(r"\*", ".*"), dtype) for part, dtype in kept.items())
    return next((dtype for pattern, dtype in patterns if re.search(pattern, name)), otherwise)


def _compute_buffers(model: PreTrainedModel, module: nn.Module, device: str) -> None:
    """Those that no file has and that are without contents yet, by the `_init_weights` of the innermost model that a
    part is of, as a tower is another's than the model around it. A part's buffers may be those that a part around it
    knows how to compute. Comes before the weights, which it would change. Raises ModelError for what none computes."""
    lacking = [
        (name, part, key)
        for name, part in module.named_modules()
        for key in part._non_persistent_buffers_set
        if part._buffers[key] is not None and part._buffers[key].is_meta
    ]
    if not lacking:
        return
    for _, part, key in lacking:
        part._buffers[key] = torch.full_like(part._buffers[key], _unset(part._buffers[key]), device=device)
    owners = {part: own for own in model.modules() if isinstance(own, PreTrainedModel) for part in own.modules()}
    for part in reversed([*module.modules()]):
        with suppress(Exception), torch.no_grad():  # it may want weights that layers in few bits have not
            owners.get(part, model)._init_weights(part)
    for name, part, key in lacking:
        if _is_unset(part._buffers[key]):
            raise ModelError(f"{type(model).__name__} computes no {name}.{key}, which is in no file")


def _unset(buffer: torch.Tensor) -> float | int:
    """A value that is no result; of truth values there is none."""
    if buffer.is_floating_point() or buffer.is_complex():
        return float("nan")
    return False if buffer.dtype is torch.bool else torch.iinfo(buffer.dtype).max


def _is_unset(buffer: torch.Tensor) -> bool:
    if not buffer.numel() or buffer.dtype is torch.bool:
        return False
    number = _unset(buffer)
    return bool((buffer == number if isinstance(number, int) else buffer.isnan()).all())
