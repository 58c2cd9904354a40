"""Checkpoints that come quantized: what they are, whether adapters train on them, what a recipe may still say."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers import AutoHfQuantizer

from qft.quant.hold.plugin import is_known, load_plugin
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.section import Problem

# Recipe field -> key of the checkpoint's own quantization_config.
BNB_KEYS = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "threshold": "llm_int8_threshold",
}

DEQUANTIZABLE = ("compressed-tensors", "gptq", "awq", "fp8", "fbgemm_fp8", "mxfp4", "torchao", "hqq", "bitsandbytes")
"""Methods whose weights model.dequantize can have dequantized."""

ROUNDS_INPUTS = ("fp8", "fbgemm_fp8")
PASSES_NOTHING_BACK = ("torchao",)
"""Methods that have no gradient where they round activations; where they round weights alone, qft holds those."""


def _groups(quantization: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Of compressed-tensors."""
    return (quantization.get("config_groups") or {}).values()


def _method(quantization: Mapping[str, Any]) -> str:
    """bitsandbytes, gptq, awq, compressed-tensors, torchao, …"""
    name = quantization.get("quant_method", "unknown")
    return str(getattr(name, "value", name))


def mode(quantization: Mapping[str, Any]) -> str:
    """The quant.mode that the checkpoint amounts to, or the method's own name."""
    if "bitsandbytes" not in _method(quantization):
        return _method(quantization)
    return "4bit" if quantization.get("load_in_4bit") else "8bit"


def skipped_layers(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(quantization.get("llm_int8_skip_modules") or quantization.get("modules_to_not_convert") or ())


def contradictions(quantization: Mapping[str, Any], loaded: LoadedRecipe) -> Iterator[Problem]:
    """Yield (field, text) for each field that the recipe sets and the checkpoint has otherwise."""
    quant, has = loaded.recipe.quant, mode(quantization)
    wanted = load_plugin(Path(quant.plugin)).method if quant.plugin else quant.mode
    if loaded.given("quant.mode") and wanted != has:
        yield "quant.mode", f"the checkpoint is already quantized ({has}), not {wanted}; {_remedy(has)}"
        return
    # transformers would only warn, and then read the integers as weights.
    if quant.plugin is None and not _is_ours_or_known(has):
        yield "model.path", f"the checkpoint is quantized with {has}, which transformers does not know; {_remedy(has)}"
        return
    for name, key in BNB_KEYS.items():
        value, settled = getattr(quant, name), quantization.get(key)
        if loaded.given(f"quant.{name}") and value not in (settled, "auto"):
            yield f"quant.{name}", f"the checkpoint is already quantized with {settled}, not {value}; remove the field"
    if set(quant.skip_modules) - set(skipped_layers(quantization)):
        yield "quant.skip_modules", "the checkpoint is already quantized and its modules are settled; remove the field"


def _is_ours_or_known(mode: str) -> bool:
    return mode in ("4bit", "8bit") or is_known(mode)


def _remedy(mode: str) -> str:
    if _is_ours_or_known(mode):
        other = ", or set model.dequantize to true" if mode in ("4bit", "8bit", *DEQUANTIZABLE) else ""
        return f"remove the quant section{other}"
    return "set quant.mode to custom and quant.plugin to the file that made it"


def checkpoint_problems(quantization: Mapping[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """What of the recipe cannot be trained on weights that come so, and are held by transformers."""
    if reason := _untrainable(quantization):
        yield "model.path", reason
    yield from packed_problems(quantization, recipe)


def packed_problems(quantization: Mapping[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """What of the recipe cannot be trained on weights that come so, whoever holds them."""
    if recipe.adapter.kind == "none":
        yield (
            "adapter.kind",
            f"the checkpoint is quantized ({_method(quantization)}), and quantized weights cannot be trained "
            f"themselves: set it to lora, or {_instead(_method(quantization))}",
        )
    if recipe.train.torch_compile:
        yield "train.torch_compile", "a quantized base cannot be compiled for training; set it to false"
    if recipe.adapter.init_lora_weights not in ("default", "gaussian"):
        yield (
            "adapter.init_lora_weights",
            f"{recipe.adapter.init_lora_weights} needs unquantized weights, and this checkpoint has none: "
            f"{_instead(_method(quantization))}",
        )


def _untrainable(quantization: Mapping[str, Any]) -> str | None:
    """Why adapters cannot be trained on such weights, by the quantizer's own word; None if they can."""
    name = _method(quantization)
    if name in ROUNDS_INPUTS or any(group.get("input_activations") for group in _groups(quantization)):
        text = "whose layers round activations too where a kernel is there, and are plain 16-bit ones where none is"
        return f"the checkpoint is quantized with {name}, {text}; {_instead(name)}"
    if name in PASSES_NOTHING_BACK:
        text = "whose layers round activations and have no gradient"
        return f"the checkpoint is quantized with {name}, {text}; {_instead(name)}"
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        return f"the checkpoint is quantized with {name}, which cannot be used here: {reason}; {_instead(name)}"
    # That of compressed-tensors (transformers 5.24) does not know until a model is loaded; peft then finds no weights.
    if getattr(quantizer, "is_trainable", False):
        return None
    return f"the checkpoint is quantized with {name}, on which transformers cannot train adapters: {_instead(name)}"


def _instead(method: str) -> str:
    plain = "start from the unquantized model"
    return f"set model.dequantize to true and hold it as quant says, or {plain}" if method in DEQUANTIZABLE else plain
