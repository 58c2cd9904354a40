"""Checkpoints that come quantized: what they are, whether adapters train on them, what a recipe may still say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.quantizers import AutoHfQuantizer

from qft.quant.hold.custom import Plugin, is_known
from qft.recipe.load import LoadedRecipe

__all__ = ["contradictions", "method", "mode", "untrainable"]

# Recipe field -> key of the checkpoint's own quantization_config.
BNB_KEYS = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "threshold": "llm_int8_threshold",
}


def method(quantization: dict[str, Any]) -> str:
    """bitsandbytes, gptq, awq, compressed-tensors, torchao, …"""
    name = quantization.get("quant_method", "unknown")
    return str(getattr(name, "value", name))


def mode(quantization: dict[str, Any]) -> str:
    """The quant.mode that the checkpoint amounts to, or the method's own name."""
    if "bitsandbytes" not in method(quantization):
        return method(quantization)
    return "4bit" if quantization.get("load_in_4bit") else "8bit"


def contradictions(
    quantization: dict[str, Any], loaded: LoadedRecipe, plugin: Plugin | None
) -> Iterator[tuple[str, str]]:
    """Yield (field, text) for each field that the recipe sets and the checkpoint has otherwise."""
    own = mode(quantization)
    quant = loaded.recipe.quant
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
    kept = quantization.get("llm_int8_skip_modules") or quantization.get("modules_to_not_convert") or ()
    if set(quant.skip_modules) - set(kept):
        yield "quant.skip_modules", "the checkpoint is already quantized and its modules are settled; remove the field"


def _remedy(own: str) -> str:
    if own in ("4bit", "8bit") or is_known(own):
        return "remove the quant section"
    return "set quant.mode to custom and quant.plugin to the file that made it"


def untrainable(quantization: dict[str, Any]) -> str | None:
    """Why adapters cannot be trained on such weights, by the quantizer's own word; None if they can."""
    name = method(quantization)
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
