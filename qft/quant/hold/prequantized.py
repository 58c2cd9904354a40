"""Checkpoints that come quantized: what they are, whether adapters train on them, what a recipe may still say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import AutoHfQuantizer

from qft.quant.hold.base import Scheme
from qft.quant.hold.bnb_4bit import Bnb4Bit
from qft.quant.hold.bnb_8bit import Bnb8Bit
from qft.quant.hold.plugin import Plugin, is_known, load_plugin
from qft.quant.layer import LayerScheme
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.rules import Problem
from qft.recipe.training import QuantSection

__all__ = ["Prequantized", "contradictions"]

# Recipe field -> key of the checkpoint's own quantization_config.
BNB_KEYS = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "threshold": "llm_int8_threshold",
}
ALIKE: dict[str, Callable[[Mapping[str, Any], str], Scheme]] = {
    "4bit": Bnb4Bit.of_checkpoint,
    "8bit": Bnb8Bit.of_checkpoint,
}
"""What holds the layers of a checkpoint in the same way, by the mode that it amounts to."""


@dataclass(frozen=True)
class Prequantized(Scheme):
    """What a checkpoint brings: transformers reads its own configuration, and is told nothing."""

    quantization: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's quantization_config."""
    alike: Scheme | None = None
    """The scheme that holds layers so; None if none of ours does."""

    @classmethod
    def of(cls, quantization: Mapping[str, Any], quant: QuantSection, dtype: str) -> Prequantized:
        """Runs the file of quant.plugin, if there is one. Raises MissingError, or ModelError for what it lacks."""
        name, plugin = _mode(quantization), _plugin(quant)
        alike = ALIKE[name](quantization, dtype) if name in ALIKE else None
        return cls(name, dtype, _skipped(quantization), plugin, quantization, alike)

    @property
    def layer(self) -> LayerScheme | None:
        return self.alike.layer if self.alike else None

    @property
    def quant_type(self) -> str | None:
        return self.alike.quant_type if self.alike else None

    @property
    def weight_format(self) -> str:
        return self.alike.weight_format if self.alike else self.name

    def short_words(self) -> str:
        return self.alike.short_words() if self.alike else self.name

    def words(self) -> str:
        return self.alike.words() if self.alike else super().words()

    def facts(self) -> dict[str, Any]:
        plugin = asdict(self.plugin) if self.plugin else None
        return {"scheme": self.name, **self.quantization, "plugin": plugin}

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        if self.alike:
            self.alike.settle(model)

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        if recipe.adapter.kind == "none":
            held = f"the checkpoint is quantized ({_method(self.quantization)})"
            yield "adapter.kind", f"{held}, and quantized weights cannot be trained themselves: set it to lora"
        if reason := _untrainable(self.quantization):
            yield "model.path", reason
        if recipe.train.torch_compile:
            yield "train.torch_compile", "a quantized base cannot be compiled for training; set it to false"
        if recipe.adapter.init_lora_weights not in ("default", "gaussian"):
            text = f"{recipe.adapter.init_lora_weights} needs the unquantized weights, and this checkpoint has none"
            yield "adapter.init_lora_weights", text

    def weight_bytes(self, rows: int, columns: int) -> int | None:
        return self.alike.weight_bytes(rows, columns) if self.alike else None


def _method(quantization: Mapping[str, Any]) -> str:
    """bitsandbytes, gptq, awq, compressed-tensors, torchao, …"""
    name = quantization.get("quant_method", "unknown")
    return str(getattr(name, "value", name))


def _mode(quantization: Mapping[str, Any]) -> str:
    """The quant.mode that the checkpoint amounts to, or the method's own name."""
    if "bitsandbytes" not in _method(quantization):
        return _method(quantization)
    return "4bit" if quantization.get("load_in_4bit") else "8bit"


def _plugin(quant: QuantSection) -> Plugin | None:
    return load_plugin(Path(quant.plugin)) if quant.plugin else None


def _skipped(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(quantization.get("llm_int8_skip_modules") or quantization.get("modules_to_not_convert") or ())


def contradictions(quantization: Mapping[str, Any], loaded: LoadedRecipe) -> Iterator[Problem]:
    """Yield (field, text) for each field that the recipe sets and the checkpoint has otherwise."""
    quant, own = loaded.recipe.quant, _mode(quantization)
    plugin = _plugin(quant)
    asked = plugin.method if plugin else quant.mode
    if loaded.given("quant.mode") and asked != own:
        yield "quant.mode", f"the checkpoint is already quantized ({own}), not {asked}; {_remedy(own)}"
        return
    # transformers would only warn, and then read the integers as weights.
    if plugin is None and own not in ("4bit", "8bit") and not is_known(own):
        yield "model.path", f"the checkpoint is quantized with {own}, which transformers does not know; {_remedy(own)}"
        return
    for name, key in BNB_KEYS.items():
        wanted, has = getattr(quant, name), quantization.get(key)
        if loaded.given(f"quant.{name}") and wanted not in (has, "auto"):
            yield f"quant.{name}", f"the checkpoint is already quantized with {has}, not {wanted}; remove the field"
    if set(quant.skip_modules) - set(_skipped(quantization)):
        yield "quant.skip_modules", "the checkpoint is already quantized and its modules are settled; remove the field"


def _remedy(own: str) -> str:
    if own in ("4bit", "8bit") or is_known(own):
        return "remove the quant section"
    return "set quant.mode to custom and quant.plugin to the file that made it"


def _untrainable(quantization: Mapping[str, Any]) -> str | None:
    """Why adapters cannot be trained on such weights, by the quantizer's own word; None if they can."""
    name = _method(quantization)
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        return f"the checkpoint is quantized with {name}, which cannot be used here: {str(error).splitlines()[0]}"
    if quantizer.is_trainable:
        return None
    return (
        f"the checkpoint is quantized with {name}, on which transformers cannot train adapters: "
        "start from the unquantized model and set quant.mode to 4bit or 8bit"
    )
