"""Schemes that hold a base: what one weight costs, what it becomes, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from qft.memory.meter import weight_bytes
from qft.quant.dequantize import dequantized_weight
from qft.quant.engines import find_engine
from qft.quant.hold import SCHEMES, Scheme, find_scheme
from qft.quant.hold.bnb_8bit import outlier_columns
from qft.quant.hold.prequantized import checkpoint_problems
from qft.quant.layer import LayerScheme
from qft.recipe.load import from_values
from qft.recipe.training import QuantSection

QUANTS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "nf4": {"mode": "4bit", "double_quant": False},
    "nf4 double": {"mode": "4bit"},
    "fp4 in bfloat16": {"mode": "4bit", "quant_type": "fp4", "quant_storage": "bfloat16"},
    "int8": {"mode": "8bit"},
}


def scheme_of(dtype: str = "bfloat16", **quant: Any) -> Scheme:
    return find_scheme(QuantSection(**quant), {}, dtype, ("lm_head",))


def test_a_checkpoint_whose_quantizer_cannot_tell_whether_it_trains_is_none_to_train_on() -> None:
    """compressed-tensors' cannot, in transformers 5.24."""
    config = find_engine("rtn").config({"layer": LayerScheme("int", 4, 32)}, torch.bfloat16)
    recipe = from_values({"model": {"path": "m"}, "data": {"train": "d"}, "output_dir": "r"}).recipe
    told = dict(checkpoint_problems(config, recipe)).get("model.path")
    knows = hasattr(AutoHfQuantizer.from_config(dict(config), pre_quantized=True), "is_trainable")
    assert knows or "cannot train adapters" in str(told)


def loaded(folder: Path, scheme: Scheme) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, scheme.dtype), device_map="cpu", **scheme.load_arguments()
    )
    scheme.settle(model)
    return model


def linears(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("kind", QUANTS)
def test_a_weight_costs_what_a_loaded_layer_holds(kind: str, tiny_model: Path) -> None:
    scheme = scheme_of(skip_modules=["up_proj"] if kind != "none" else (), **QUANTS[kind])
    layers = linears(loaded(tiny_model, scheme))
    unquantized = scheme_of(mode="none")
    for name, layer in layers.items():
        rows, columns = layer.out_features, layer.in_features
        of = scheme if scheme.quantizes(name) else unquantized
        assert of.weight_bytes(rows, columns) == sum(weight_bytes(layer).values()), name
    assert len({scheme.quantizes(name) for name in layers}) == (1 if kind == "none" else 2)


@pytest.mark.parametrize("shape", [(1, 64), (3, 50), (300, 129)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_of_any_shape_costs_its_blocks(shape: tuple[int, int], double_quant: bool) -> None:
    weight: Any = bnb.nn.Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=double_quant).to("cpu")
    scheme = scheme_of(mode="4bit", double_quant=double_quant)
    assert scheme.weight_bytes(*shape) == weight_bytes(nn.ParameterList([weight]))["frozen"]


@pytest.mark.parametrize("kind", [kind for kind in QUANTS if kind != "none"])
def test_a_round_trip_is_what_a_loaded_layer_multiplies_with(kind: str, tiny_model: Path) -> None:
    scheme = scheme_of(**QUANTS[kind])
    original, held = (linears(loaded(tiny_model, s)) for s in (scheme_of(mode="none"), scheme))
    for name in (name for name in held if scheme.quantizes(name)):
        weight = original[name].weight.data
        rounded = scheme.round_trip(weight)
        assert torch.equal(rounded, dequantized_weight(held[name])), name
        assert not torch.equal(rounded.to(weight.dtype), weight)


@pytest.mark.parametrize("kind", [kind for kind in QUANTS if kind != "none"])
def test_a_saved_checkpoint_is_held_as_it_was(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    scheme = scheme_of(**QUANTS[kind])
    model = loaded(tiny_model, scheme)
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config
    again = find_scheme(QuantSection(), config.to_dict(), "bfloat16", ("lm_head",))
    for name in ("layer", "quant_type", "weight_format", "skipped", "name"):
        assert getattr(again, name) == getattr(scheme, name), name
    assert again.short_words() == scheme.short_words()
    assert again.words() == scheme.words()
    assert again.weight_bytes(300, 129) == scheme.weight_bytes(300, 129)
    assert again.load_arguments() == {}


WORDS = {
    "none": ("none", "bfloat16"),
    "nf4": ("4bit nf4, computed in bfloat16, not lm_head", "4 bits (nf4)"),
    "nf4 double": ("4bit nf4, double quantization, computed in bfloat16, not lm_head", "4 bits (nf4)"),
    "int8": ("8bit, not lm_head", "8 bits (LLM.int8())"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_words_tell_what_is_held(kind: str) -> None:
    scheme = scheme_of(**QUANTS[kind])
    assert (scheme.words(), scheme.short_words()) == WORDS[kind]


def test_layers_that_are_left_later_are_left() -> None:
    scheme = scheme_of(mode="4bit")
    assert scheme.quantizes("model.layers.0.mlp.up_proj")
    later = scheme.leaving(["model.layers.0.mlp.up_proj"])
    assert not later.quantizes("model.layers.0.mlp.up_proj")
    assert later.quantizes("model.layers.1.mlp.up_proj")
    assert later.config()["llm_int8_skip_modules"] == ["lm_head", "model.layers.0.mlp.up_proj"]


def test_a_checkpoint_of_another_method_is_told_by_its_name() -> None:
    config = {"quant_method": "gptq", "bits": 4, "modules_to_not_convert": ["lm_head"]}
    scheme = find_scheme(QuantSection(), config, "float16", ("lm_head",))
    assert (scheme.name, scheme.words(), scheme.short_words()) == ("gptq", "gptq, not lm_head", "gptq")
    assert (scheme.layer, scheme.weight_bytes(8, 8), scheme.engine) == (None, None, None)
    assert scheme.facts() == {"scheme": "gptq", **config, "plugin": None}
    assert SCHEMES.keys() == {"none", "8bit", "4bit", "custom", "qat"}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 80), (128, 48), (33, 100), (4, 64)])
def test_a_row_need_be_no_whole_number_of_blocks(kind: str, shape: tuple[int, int]) -> None:
    """bitsandbytes' own kernel for CPUs gives other values then, without a word."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=False).to("cpu")
    state = made.weight.quant_state
    codes = made.weight.data.flatten()
    table = state.code[torch.stack([codes >> 4, codes & 15], 1).flatten().long()][: weight.numel()]
    wanted = (table * state.absmax.repeat_interleave(64)[: weight.numel()]).reshape(shape)
    assert torch.allclose(dequantized_weight(made), wanted, atol=1e-6)
    inputs = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.allclose(made(inputs), inputs @ wanted.T, atol=1e-4)


@pytest.mark.parametrize(("width", "inner"), [(1536, 8960), (2048, 8192), (4096, 11008)])
def test_outliers_are_as_many_as_random_weights_make(width: int, inner: int) -> None:
    torch.manual_seed(0)
    x, some = torch.randn(2048, width), 256
    gate, up = (x @ torch.randn(width, some).mul(0.02) for _ in range(2))
    above = (torch.nn.functional.silu(gate) * up).abs().gt(6).any(0).float().mean()
    assert outlier_columns(width, inner, len(x), 6.0) / inner == pytest.approx(float(above), abs=0.05)
    assert outlier_columns(inner, width, len(x), 6.0) == 0
