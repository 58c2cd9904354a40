"""The part of a model that text reaches, and the layers of it that other code reads: told without weights."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import PretrainedConfig

from qft.checkpoint.bypassed import bypassed_linears, common_ends, initialized_linears
from qft.checkpoint.language import auto_class, beside_language, tensors_beside, text_problem
from tests.support.tiny import tiny_config, tiny_skeleton

BESIDE = {
    "llama": [],
    "qwen3_vl": ["model.visual"],
    "mistral3": ["model.vision_tower", "model.multi_modal_projector"],
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "llava_next": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen2_5_omni_thinker": ["model.audio_tower", "model.visual"],
}


@pytest.mark.parametrize("kind", BESIDE)
def test_towers_and_projectors_are_told_from_the_language_part(kind: str) -> None:
    model = tiny_skeleton(kind)
    found = beside_language(model)
    modules = dict(model.named_modules())
    # transformers 5.17 has those of Omni one level further up.
    expected = [name if name in modules else name.removeprefix("model.") for name in BESIDE[kind]]
    assert sorted(found) == sorted(expected)
    known = [name for name in model.state_dict() if name.startswith(tuple(f"{name}." for name in found))]
    beside = tensors_beside(model)
    assert beside >= set(known)
    assert beside - set(known) == ({"model.image_newline"} if kind == "llava_next" else set())


def test_the_class_that_the_configuration_names_loads_the_model() -> None:
    assert beside_language(tiny_skeleton("qwen3_5")) == ["model.visual"]
    alone = tiny_skeleton("qwen3_5", architectures=["Qwen3_5ForCausalLM"])
    assert type(alone).__name__ == "Qwen3_5ForCausalLM"
    assert beside_language(alone) == []
    assert auto_class(tiny_config("qwen3_vl")).__name__ == "AutoModelForImageTextToText"
    assert auto_class(tiny_config("gemma3")).__name__ == "AutoModelForCausalLM"  # which makes that class, too
    assert auto_class(PretrainedConfig()).__name__ == "AutoModelForCausalLM"


REFUSED = {
    "bert": "does not say is_decoder",
    "xlnet": "reads in both directions",
    "paligemma": "reads in both directions",
    "blip": "wants pixel_values",
    "t5gemma2": "an encoder beside its decoder",
    "rwkv": "set rescale_every to 0",
    "gemma4_unified_assistant": "drafts for another model",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_text_alone_cannot_train_is_told(kind: str) -> None:
    problem = text_problem(tiny_skeleton(kind, **({"is_decoder": False} if kind == "bert" else {})))
    assert problem is not None
    assert REFUSED[kind] in problem


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt_neox_japanese", "gemma3", "mistral3", "bart", "bert"])
def test_what_it_can_train_is_not_refused(kind: str) -> None:
    causal = {"is_decoder": False} if kind.startswith("gpt_neox") else {}  # as their published files have it
    assert text_problem(tiny_skeleton(kind, **causal)) is None


BYPASSED = {
    "llama": [],
    "gpt2": [],
    "qwen3_moe": [],
    "mamba": ["dt_proj"],  # its scan multiplies with the weight
    "hunyuan_v1_moe": ["wg"],  # its input is cast to the weight's dtype
    "longcat_flash": ["classifier"],
}


@pytest.mark.parametrize("kind", BYPASSED)
def test_layers_whose_weights_other_code_reads_are_found(kind: str) -> None:
    model = tiny_skeleton(kind)
    found = bypassed_linears(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert common_ends(found, [name for name in linears if name not in found]) == BYPASSED[kind]
    assert bypassed_linears(model) == found == [name for name in linears if name.endswith(tuple(BYPASSED[kind]))]


INITIALIZED = {"llama": [], "qwen3_moe": [], "mamba2": ["out_proj"], "gpt_bigcode": ["c_proj"], "nanochat": ["o_proj"]}


@pytest.mark.parametrize("kind", INITIALIZED)
def test_layers_whose_weights_are_set_where_a_model_is_loaded_are_found(kind: str) -> None:
    model = tiny_skeleton(kind)
    before = [(name, weight.shape) for name, weight in model.named_parameters()]
    ends = tuple(INITIALIZED[kind])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert initialized_linears(model) == [name for name in linears if ends and name.endswith(ends)]
    assert [(name, weight.shape) for name, weight in model.named_parameters()] == before


def test_an_end_is_as_short_as_it_can_be() -> None:
    assert common_ends(["a.0.x.w", "a.1.x.w"], ["a.0.y.w"]) == ["x.w"]
    assert common_ends(["a.w"], ["b.a.w"]) == ["a.w"]
    assert common_ends([], ["a"]) == []
