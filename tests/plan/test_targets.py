"""What adapters are kept from: towers, routers, and what peft would not find again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qft.commands.check import planned
from qft.documents.plan import PlanDocument
from qft.errors import QftError
from qft.plan.targets import exclusion
from qft.recipe import load
from qft.recipe.training import AdapterSection
from tests.support.once import once
from tests.support.sweep import write_recipe
from tests.support.tiny import tiny_skeleton, write_tiny_model

KINDS = ("gemma3", "laguna", "llama")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for kind in KINDS:
            write_tiny_model(folder / kind, kind)

    return once(tmp_path_factory, "bases-for-targets", make)


def plan(folder: Path, base: Path, **adapter: Any) -> PlanDocument:
    found = planned(load(write_recipe(folder, base, adapter={"r": 2} | adapter)))
    assert found.kind == "plan"
    return found


def left_out(kind: str, **adapter: Any) -> list[str]:
    """Names of the layers that the exclusion matches, without the numbers of blocks."""
    model = tiny_skeleton(kind)
    pattern = exclusion(AdapterSection(**adapter), model)
    names = [name for name, _ in model.named_modules() if isinstance(pattern, str) and re.fullmatch(pattern, name)]
    return sorted({re.sub(r"\.\d+", "", name) for name in names})


def test_layers_that_are_no_product_are_left_out_of_all_linear() -> None:
    assert left_out("phimoe") == ["model.layers.mlp.router"]  # gives back weights and choices of experts
    assert left_out("mamba") == ["backbone.layers.mixer.dt_proj", "backbone.layers.mixer.out_proj"]
    assert exclusion(AdapterSection(), tiny_skeleton("llama")) is None
    assert exclusion(AdapterSection(exclude_modules=("q_proj",)), tiny_skeleton("llama")) == ["q_proj"]


def test_what_the_recipe_leaves_out_is_left_out_beside_the_tower() -> None:
    ends = left_out("qwen3_vl", exclude_modules=("q_proj", "mlp.up_proj"))
    language = [name for name in ends if not name.startswith("model.visual")]
    assert language == ["model.language_model.layers.mlp.up_proj", "model.language_model.layers.self_attn.q_proj"]
    assert "model.visual.blocks.attn.qkv" in ends
    pattern = left_out("qwen3_vl", exclude_modules=r".*k_proj", target_towers=True)
    assert pattern == ["model.language_model.layers.self_attn.k_proj"]


def test_adapters_are_on_the_tower_only_where_it_is_asked(bases: Path, tmp_path: Path) -> None:
    base = bases / "gemma3"
    counts = {
        towers: plan(tmp_path, base, target_towers=towers, target_modules=["q_proj"]).matched["adapter.target_modules"]
        for towers in (False, True)
    }
    assert counts == {False: {"q_proj": 2}, True: {"q_proj": 4}}
    with pytest.raises(QftError, match=r"fc1 matches nothing of the language part.*adapter\.target_towers"):
        plan(tmp_path, base, target_modules=["q_proj", "fc1"])
    with pytest.raises(QftError, match=r"adapter\.target_towers: the model is a language model alone"):
        plan(tmp_path, bases / "llama", target_towers=True)


def test_a_tower_is_not_quantized_and_counts_as_left_by_request(bases: Path, tmp_path: Path) -> None:
    found = plan(tmp_path, bases / "gemma3")
    assert found.model.beside == ["model.vision_tower", "model.multi_modal_projector"]
    assert "not lm_head, model.vision_tower, model.multi_modal_projector" in found.quantization.described
    share = found.quantization.quantized_share
    assert share is not None
    assert 0.3 < share < 0.9  # of all weights, and no leave was needed for it
    assert found.matched["adapter.target_modules"] == {"all-linear": 14}


def test_an_adapter_that_peft_would_not_load_again_is_refused_before_it_is_trained(bases: Path, tmp_path: Path) -> None:
    held = {"quant": {"preset": "finetune", "allow_partial": True}}
    with pytest.raises(QftError, match=r"shared_experts\.\.down_proj.*exclude_modules"):
        planned(load(write_recipe(tmp_path, bases / "laguna", **held)))
    kept = {"adapter": {"r": 2, "exclude_modules": ".*shared_experts.*"}}
    assert planned(load(write_recipe(tmp_path, bases / "laguna", **held | kept))).kind == "plan"
