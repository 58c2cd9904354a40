"""Layers of a loaded model that multiply with what quant.target makes of their weights, the adapter's delta included.

W + s B A is added up as a merge adds it (in float32, then in the scheme's dtype) and rounded as the export rounds it:
what is trained is what is written. A layer stays what it is, under its names: its `forward` alone is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional

from qft.errors import ModelError
from qft.model.delta import merged
from qft.plan import ModelPlan
from qft.quant.hold import Qat
from qft.quant.rounding import Rounding, straight_through


class Switch:
    """Whether the layers of one model round."""

    on = True
    in_training = True
    """Whether they do while they are trained."""


class _Layer:
    """What a layer does in the place of its own forward."""

    def __init__(
        self, layer: Any, rounding: Rounding | None, dtype: torch.dtype, inputs: Rounding | None, switch: Switch
    ) -> None:
        self.layer, self.rounding, self.dtype, self.switch = layer, rounding, dtype, switch
        self.inputs = inputs if rounding else None

    @property
    def rounds(self) -> bool:
        return self.switch.on and (self.switch.in_training or not self.layer.training)

    def rounded(self, values: torch.Tensor, rounding: Rounding | None) -> torch.Tensor:
        """In the dtype in which the file gives them back."""
        values = values.to(self.dtype)
        return straight_through(values, rounding) if rounding and self.rounds else values


class _Linear(_Layer):
    """inputs [..., in] -> outputs [..., out]"""

    _kept: tuple[Any, torch.Tensor] | None = None
    """The weight that was made last without a gradient, with what it was made of: an answer asks for it each token."""

    def __call__(self, inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        base: Any = getattr(self.layer, "base_layer", self.layer)
        if self.inputs:
            inputs = self.rounded(inputs, self.inputs).to(inputs.dtype)
        # Under autocast the product itself casts, and for a moment only.
        dtype = None if torch.is_autocast_enabled(inputs.device.type) else inputs.dtype
        bias = base.bias if base.bias is None else base.bias.to(dtype)
        return functional.linear(inputs, self.weight(dtype), bias)

    def weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What it multiplies with, [out, in]; None: in the dtype in which the file gives it back."""
        base = getattr(self.layer, "base_layer", self.layer)
        delta = getattr(self.layer, "lora_A", {}) and not self.layer.disable_adapters
        parts = [base.weight, *_adapter_parts(self.layer)] if delta else [base.weight]
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            self._kept = None
            return self._made(parts, dtype)
        key = (
            self.rounds,
            dtype,
            torch.is_inference_mode_enabled(),
            [(part.data_ptr(), part._version) for part in parts],
        )
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._made(parts, dtype)
        return self._kept[1]

    def _made(self, parts: list[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
        weight = parts[0]
        if len(parts) > 1:
            weight = merged(weight, self.layer.scaling["default"], *parts[1:])
        return self.rounded(weight, self.rounding).to(dtype)


class _Embedding(_Layer):
    """ids [...] -> rows [..., dim], which are rounded once they are looked up: a block lies within a row."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        return self.rounded(functional.embedding(ids, layer.weight, layer.padding_idx), self.rounding).to(
            layer.weight.dtype
        )


KINDS: dict[type, type[_Layer]] = {nn.Linear: _Linear, nn.Embedding: _Embedding}


def round_weights(model: Any, plan: ModelPlan) -> None:
    """Make a loaded model, its adapter attached, multiply as planned with quant.mode qat; others are left as they are.
    Raises ModelError for an embedding that does more than look up."""
    if isinstance(scheme := plan.scheme, Qat):
        dtype = getattr(torch, scheme.dtype)
        round_layers(model, scheme.roundings(plan.skeleton), dtype, scheme.target.inputs)


def round_layers(
    model: Any, roundings: Mapping[str, Rounding], dtype: torch.dtype, inputs: Rounding | None = None
) -> None:
    """The same for layers by name, each with a rounding of its own, from `dtype`; `inputs` is that of their inputs."""
    switch = Switch()
    base = getattr(model, "get_base_model", lambda: model)()
    # Whatever else has an adapter is merged all the same, as it will be.
    adapted = [name for name, module in base.named_modules() if _is_adapted_linear(module)]
    layers: dict[str, Rounding | None] = dict.fromkeys(adapted) | dict(roundings)
    for name, rounding in layers.items():
        for module in _copies(base.get_submodule(name)):
            inner = getattr(module, "base_layer", module)
            kind = KINDS.get(type(inner))
            if kind is None or (kind is _Embedding and isinstance(module, LoraLayer)):
                raise ModelError(f"{name}: quant.mode qat rounds no {type(inner).__name__}")
            vars(module)["forward"] = kind(module, rounding, dtype, inputs, switch)


def rounded_weight(layer: nn.Module) -> torch.Tensor | None:
    """What a layer that `round_weights` has changed multiplies with, [out, in]; None of another."""
    own = vars(layer).get("forward")
    return own.weight() if isinstance(own, _Linear) else None


def switch_of(model: nn.Module) -> Switch | None:
    """Of a model that `round_weights` has changed."""
    layers = (vars(module).get("forward") for module in model.modules())
    return next((layer.switch for layer in layers if isinstance(layer, _Layer)), None)


@contextmanager
def without_rounding(model: Any) -> Iterator[None]:
    """Within it the model is the base: neither rounded nor adapted."""
    switch = switch_of(model)
    assert switch is not None
    switch.on = False
    try:
        with model.disable_adapter():
            yield
    finally:
        switch.on = True


def _is_adapted_linear(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and type(module.get_base_layer()) is nn.Linear


def _copies(module: nn.Module) -> list[nn.Module]:
    """The module, or both that peft has of one that is saved whole."""
    if isinstance(module, ModulesToSaveWrapper):
        return [module.original_module, *module.modules_to_save.values()]
    return [module]


def _adapter_parts(layer: Any) -> list[torch.Tensor]:
    """A [r, in], B [out, r] and, with DoRA, the magnitudes [out]."""
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [*parts, *(vector.weight for vector in layer.lora_magnitude_vector.values())]
