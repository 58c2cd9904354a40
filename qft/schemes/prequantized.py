"""Checkpoints that come quantized: what they are, whether adapters train on them, what a recipe may still say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.quantizers import AutoHfQuantizer

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


def contradictions(quantization: dict[str, Any], loaded: LoadedRecipe) -> Iterator[tuple[str, str]]:
    """Yield (field, text) for each field that the recipe sets and the checkpoint has otherwise."""
    own = mode(quantization)
    quant = loaded.recipe.quant
    if loaded.given("quant.mode") and quant.mode != own:
        yield "quant.mode", f"the checkpoint is already quantized ({own}), not {quant.mode}; remove the quant section"
        return
    for name, key in BNB_KEYS.items():
        wanted, has = getattr(quant, name), quantization.get(key)
        if loaded.given(f"quant.{name}") and wanted not in (has, "auto"):
            yield f"quant.{name}", f"the checkpoint is already quantized with {has}, not {wanted}; remove the field"
    if quant.skip_modules and set(quant.skip_modules) - set(quantization.get("llm_int8_skip_modules") or ()):
        yield "quant.skip_modules", "the checkpoint is already quantized and its modules are settled; remove the field"


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
