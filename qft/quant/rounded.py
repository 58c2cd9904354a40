"""Layers of a loaded model that multiply with what quant.target makes of their weights, the adapter's delta included.

W + s B A is added up as a merge adds it (in float32, then in the scheme's dtype) and rounded as the export rounds it:
what is trained is what is written. A layer stays what it is, under its names: its `forward` alone is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional

from qft.errors import ModelError
from qft.quant.delta import merged
from qft.quant.hold import Qat
from qft.quant.layer import siblings
from qft.quant.rounding import Integer, Rounding, largest_of, sharing, static_int8, straight_through
from qft.quant.rounding_state import NAME, LayerState, RoundingState


class Switch:
    """Whether the layers of one model round."""

    on = True
    in_training = True
    """Whether they do while they are trained."""


class _Layer:
    """What a layer does in the place of its own forward."""

    state: LayerState | None = None
    """What is learnt of it besides."""

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

    shares: Sequence[_Linear] = ()
    """The layers whose largest weight the rounding asks for, itself among them; none: it asks for nothing."""
    _kept: tuple[Any, torch.Tensor] | None = None
    """The weight that was made last without a gradient, with what it was made of: an answer asks for it each token."""
    _largest: tuple[Any, torch.Tensor] | None = None
    """Likewise, until a step changes it."""

    def __call__(self, inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        base: Any = getattr(self.layer, "base_layer", self.layer)
        if rounding := self._of_inputs(inputs):
            inputs = self.rounded(inputs, rounding).to(inputs.dtype)
        # Under autocast the product itself casts, and for a moment only.
        dtype = None if torch.is_autocast_enabled(inputs.device.type) else inputs.dtype
        bias = base.bias if base.bias is None else base.bias.to(dtype)
        return functional.linear(inputs, self.weight(dtype), bias)

    def weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What it multiplies with, [out, in]; None: in the dtype in which the file gives it back."""
        if torch.is_grad_enabled() and any(part.requires_grad for part in self._sources()):
            self._kept = None
            return self._made(dtype)
        device = self.base_weight.device.type
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # what is kept is cast once
        key = (self.rounds, dtype, [layer._key() for layer in self.shares or [self]])
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before another is made
            self._kept = key, self._made(dtype)
        return self._kept[1]

    def largest(self) -> torch.Tensor:
        """Of the weight before it is rounded: the largest magnitude []."""
        key = self._key()
        if self._largest is None or self._largest[0] != key:
            with torch.no_grad():
                self._largest = key, largest_of(self._merged().to(self.dtype))
        return self._largest[1]

    def measure(self) -> None:
        """Start to learn from the scales that the weight has now."""
        if self.state and isinstance(self.rounding, Integer):
            with torch.no_grad():
                # Without contents it is merged with nothing: torch has no autocast there.
                weight = self.base_weight if self.base_weight.is_meta else self._merged()
                self.state.learn_from(self.rounding.scales(weight.to(self.dtype)))

    def _of_inputs(self, inputs: torch.Tensor) -> Rounding | None:
        if self.state and self.state.largest is not None:
            if self.layer.training:
                self.state.look(inputs.to(self.dtype))
            return partial(static_int8, largest=self.state.largest)
        return self.inputs

    def _made(self, dtype: torch.dtype | None) -> torch.Tensor:
        rounding = self.rounding
        scale = self.state.scale if self.state and self.rounds else None
        if scale is not None and isinstance(rounding, Integer):
            return rounding.learnt(self._merged().to(self.dtype), scale).to(dtype)
        if rounding and self.shares and self.rounds:
            rounding = sharing(rounding, [layer.largest() for layer in self.shares])
        return self.rounded(self._merged(), rounding).to(dtype)

    def _merged(self) -> torch.Tensor:
        weight, *adapter = self._parts()
        return merged(weight, self.layer.scaling["default"], *adapter) if adapter else weight

    @property
    def base_weight(self) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.layer, "base_layer", self.layer).weight
        return weight

    def _parts(self) -> list[torch.Tensor]:
        """What the weight is made of: the base's, and that of an adapter which is on."""
        delta = getattr(self.layer, "lora_A", {}) and not self.layer.disable_adapters
        return [self.base_weight, *_adapter_parts(self.layer)] if delta else [self.base_weight]

    def _sources(self) -> list[torch.Tensor]:
        """What the rounded weight is made of."""
        state = self.state
        learnt = [] if state is None or state.change is None or state.start is None else [state.start, state.change]
        return [*self._parts(), *learnt]

    def _key(self) -> Any:
        """Which is another once one of them has changed."""
        return torch.is_inference_mode_enabled(), [(p.untyped_storage()._cdata, p._version) for p in self._sources()]


class _Embedding(_Layer):
    """ids [...] -> rows [..., dim], which are rounded once they are looked up: a block lies within a row."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        return self.rounded(functional.embedding(ids, layer.weight, layer.padding_idx), self.rounding).to(
            layer.weight.dtype
        )


KINDS: dict[type, type[_Layer]] = {nn.Linear: _Linear, nn.Embedding: _Embedding}


def round_as(model: Any, scheme: Qat, roundings: Mapping[str, Rounding]) -> None:
    """Make a model, its adapter attached, multiply as the scheme says; `roundings` are the scheme's of its base. Raises
    ModelError for an embedding that does more than look up."""
    base = getattr(model, "get_base_model", lambda: model)()
    round_layers(model, roundings, getattr(torch, scheme.dtype), scheme.target.inputs)
    if scheme.learns:
        _add_state(model, base, sorted(roundings), scheme)
    if scheme.target.shares:
        for names in siblings(dict.fromkeys(roundings)):
            together = [_layer_of(base, name) for name in names]
            for layer in together:
                layer.shares = together


def round_layers(
    model: Any, roundings: Mapping[str, Rounding], dtype: torch.dtype, inputs: Rounding | None = None
) -> None:
    """The same for layers by name, each with a rounding of its own, from `dtype`; `inputs` is that of their inputs."""
    switch, base = Switch(), getattr(model, "get_base_model", lambda: model)()
    # Whatever else has an adapter is merged all the same, as it will be.
    adapted = [name for name, module in base.named_modules() if _is_adapted_linear(module)]
    layers: dict[str, Rounding | None] = {**dict.fromkeys(adapted), **roundings}
    for name, rounding in layers.items():
        for module in _copies(base.get_submodule(name)):
            inner = getattr(module, "base_layer", module)
            kind = KINDS.get(type(inner))
            if kind is None or (kind is _Embedding and isinstance(module, LoraLayer)):
                raise ModelError(f"{name}: quant.mode qat rounds no {type(inner).__name__}")
            vars(module)["forward"] = kind(module, rounding, dtype, inputs, switch)


def _add_state(model: Any, base: Any, names: list[str], scheme: Qat) -> None:
    state = RoundingState(names)
    for name in names:
        layer, own = _layer_of(base, name), state.by_name[name]
        layer.state = own
        if scheme.target.observes:
            own.observe_on(layer.base_weight.device)
        if scheme.learns_scales:
            layer.measure()
    model.add_module(NAME, state)


def measure_scales(model: Any) -> None:
    """Have scales that are learnt start from the weights as they are now, where rounding begins later than the
    training."""
    for module in model.modules():
        layer = vars(module).get("forward")
        if isinstance(layer, _Linear) and layer.state and layer.state.change is not None:
            layer.measure()


def _layer_of(base: Any, name: str) -> _Linear:
    found: _Linear = vars(_copies(base.get_submodule(name))[-1])["forward"]
    return found


def rounded_weight(layer: nn.Module) -> torch.Tensor | None:
    """What a layer that `round_layers` has changed multiplies with, [out, in]; None of another."""
    own = vars(layer).get("forward")
    return own.weight() if isinstance(own, _Linear) else None


def switch_of(model: nn.Module) -> Switch | None:
    """Of a model that `round_layers` has changed."""
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
