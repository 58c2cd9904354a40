"""Mixtures in few bits: adapters compute, are written and merged as peft has them on plain dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qft.errors import RecipeError
from qft.memory.ledger import Ledger
from qft.memory.meter import weight_bytes
from qft.model.adapter import attach_adapter, save_adapter, with_adapter
from qft.model.handover import foreseen
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.plan import make_plan
from qft.quant.stacked import Stacked
from qft.recipe import load
from tests.support.mixtures import MIXTURES, write_mixture
from tests.support.once import once

RecipeFile = Callable[..., Path]
Mixtures = Callable[[str], Path]
IDS = torch.arange(3, 63).view(2, 30)


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    return lambda kind: once(tmp_path_factory, f"mixture-{kind}", lambda folder: write_mixture(folder, kind))


def planned(path: Path, recipe_file: RecipeFile, **sections: Any) -> Any:
    model = {"path": str(path), "dtype": "float32"}
    quant = sections.pop("quant", {})
    quant = ({} if "mode" in quant else {"compute_dtype": "float32"}) | quant
    return make_plan(load(recipe_file(model=model, quant=quant, **sections)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_nine_in_ten_weights_are_in_4_bits(kind: str, mixtures: Mixtures, recipe_file: RecipeFile) -> None:
    plan = planned(mixtures(kind), recipe_file)
    assert plan.document().quantization.quantized_share > 0.99
    assert plan.memory.unknown is None or kind == "jetmoe"  # whose code asks how many tokens each expert has
    base = load_base(plan.model)
    held = [parameter for parameter in base.parameters() if isinstance(parameter, Stacked)]
    assert len(held) == len(plan.model.scheme.holds_experts(plan.model.skeleton)) > 0
    meant = dequantized(base, plan)
    torch.testing.assert_close(base(IDS).logits, meant(IDS).logits)


def dequantized(base: Any, plan: Any) -> Any:
    """A plain model of the values that `base` multiplies with."""
    read = MergedWeights(plan.model, None, "float32", "dequantized").reader()
    plain = AutoModelForCausalLM.from_pretrained(plan.model.checkpoint.folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(read(name))
    return plain.requires_grad_(False)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
def test_adapters_of_experts_are_pefts_own(
    kind: str, mixtures: Mixtures, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    """Gradients, what is written, and the merged weights, beside peft on a plain model."""
    plan = planned(mixtures(kind), recipe_file, adapter={"r": 4, "lora_alpha": 8.0, "target_experts": True})
    model = attach_adapter(load_base(plan.model), plan)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, plan, tmp_path / "adapter", None)
    plain = peft.PeftModel.from_pretrained(dequantized(model, plan), str(tmp_path / "adapter"), is_trainable=True)
    losses = [each(IDS, labels=IDS).loss for each in (model, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    found, meant = ({n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in (model, plain))
    assert any("experts" in name or kind == "jetmoe" for name in found)
    torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-5)
    MergedWeights(plan.model, tmp_path / "adapter", "float32", "dequantized").write(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    again = with_adapter(load_base(plan.model), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(again(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "adapted", "why"),
    [
        ({"r": 1}, 4, "true: experts are"),
        ({"r": 16}, 0, "more than 10%"),
        ({"r": 16, "target_experts": True}, 4, "as the recipe says"),
        ({"r": 1, "target_experts": False}, 0, "as the recipe says"),
        ({"r": 1, "lora_dropout": 0.1}, 0, "no lora_dropout"),
        ({"r": 1, "target_modules": ["q_proj"]}, 0, "target_modules names"),
        ({"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [1], "target_experts": True}, 2, "recipe"),
        ({"r": 1, "exclude_modules": r".*\.0\.mlp\.experts", "target_experts": True}, 2, "recipe"),
    ],
)
def test_whether_experts_are_adapted_is_decided_and_told(
    adapter: dict[str, Any], adapted: int, why: str, mixtures: Mixtures, recipe_file: RecipeFile
) -> None:
    plan = planned(mixtures("qwen3_moe"), recipe_file, adapter=adapter)
    told = plan.document().experts
    assert (told.adapted, told.router) == (adapted, "frozen")
    assert why in told.decided
    rest = plan.model.shape.trainable_parameters - told.trainable_parameters
    assert told.trainable_parameters == adapted // 2 * 4 * adapter["r"] * (64 + 128 + 64 + 64)
    assert 0 < rest < 4 * 2 * adapter["r"] * 128 + 1  # of attention


class OnHost(Ledger):  # type: ignore[no-untyped-call]
    """Leaves out what has no contents."""

    def note(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            super().note(tensor)


def test_loading_takes_a_layer_beside_what_is_held(tmp_path: Path, recipe_file: RecipeFile) -> None:
    plan = planned(write_mixture(tmp_path / "deep", "qwen3_moe", num_hidden_layers=12), recipe_file)
    ledger = OnHost(lambda tensor, label: label)
    with ledger:
        model = load_base(plan.model)
    stack = 4 * plan.model.skeleton.get_parameter("model.layers.0.mlp.experts.gate_up_proj").numel()
    held = sum(weight_bytes(model).values())
    assert ledger.peaks()[""].total < held + 4 * stack  # as files have it, put together, and as it is quantized
    assert held + 4 * stack < 12 * 1.5 * stack


def test_names_that_peft_takes_for_experts_are_told_and_merged(
    mixtures: Mixtures, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    adapter = {"r": 4, "target_modules": ["w1", "w2", "w3"]}
    plan = planned(mixtures("mixtral"), recipe_file, adapter=adapter)
    told = plan.document().experts
    assert (told.adapted, told.decided) == (4, "true: target_modules names them")
    assert told.trainable_parameters == plan.model.shape.trainable_parameters
    model = attach_adapter(load_base(plan.model), plan)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, plan, tmp_path / "adapter", None)
    MergedWeights(plan.model, tmp_path / "adapter", "float32", "dequantized").write(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(RecipeError, match="peft takes names in target_modules for"):
        planned(mixtures("mixtral"), recipe_file, adapter=adapter | {"target_experts": False})


@pytest.mark.parametrize(
    ("kind", "sections", "told"),
    [
        ("qwen3_moe", {"adapter": {"target_experts": True, "lora_dropout": 0.1}}, "no lora_dropout"),
        ("qwen3_moe", {"adapter": {"target_experts": True, "use_dora": True}}, "no use_dora"),
        ("qwen3_moe", {"adapter": {"modules_to_save": ["experts"]}}, "is quantized, and cannot be trained whole"),
        ("glm4_moe", {"train": {"router_aux_loss_coef": 0.1}}, "computes no loss of that kind"),
    ],
)
def test_what_experts_cannot_have_is_refused(
    kind: str, sections: dict[str, Any], told: str, mixtures: Mixtures, recipe_file: RecipeFile
) -> None:
    with pytest.raises(RecipeError, match=told):
        planned(mixtures(kind), recipe_file, **sections)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_what_rounds_layers_alone_is_refused_before_the_training_or_meant(
    kind: str, mixtures: Mixtures, recipe_file: RecipeFile
) -> None:
    forms = ["adapter", "bnb-4bit", "bnb-8bit", "compressed-tensors", "torchao"]
    for meant in (False, True):
        plan = planned(mixtures(kind), recipe_file, quant={"allow_partial": meant})
        found = foreseen(plan, forms)
        assert found.pop("adapter") is None
        if not meant:
            reasons = ("experts and its like are not", "one expert at a time")
            assert all(any(reason in str(why) for reason in reasons) for why in found.values())
        elif kind == "llama4_text":
            assert found.pop("torchao") is None
            assert all("transformers reads Llama4TextExperts" in str(why) for why in found.values())
        else:
            assert set(found.values()) == {None}


def test_llm_int8_leaves_out_what_it_cannot_multiply(mixtures: Mixtures, recipe_file: RecipeFile) -> None:
    """A layer of DeepSeek's is given four dimensions."""
    eight = planned(mixtures("deepseek_v3"), recipe_file, quant={"preset": ..., "mode": "8bit"})
    assert "kv_b_proj" in eight.model.scheme.skipped
    assert load_base(eight.model)(IDS).logits.isfinite().all()
    four = planned(mixtures("deepseek_v3"), recipe_file)
    assert four.model.scheme.quantizes("model.layers.0.self_attn.kv_b_proj")
