"""An adapter is put on, or merged, with every weight that it calls for, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qft.errors import ModelError
from qft.model.adapter import with_adapter
from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.recipe.load import from_values
from tests.support.models import tiny_llama

Tensors = dict[str, torch.Tensor]
A, B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def merged(base: Path, adapter: Path) -> object:
    values = {"model": {"path": str(base), "dtype": "float32"}, "data": {"train": "-"}, "output_dir": "-"}
    return MergedWeights(plan_model(from_values(values)), adapter, "float32", "original")


CHANGES: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "one is missing": (lambda t: t.pop(B), "q_proj.lora_B", f"lacks {B}"),
    "a layer is missing": (lambda t: [t.pop(A), t.pop(B)], "q_proj.lora_A", f"lacks {A}, {B}"),
    "another block": (lambda t: t.update({A.replace("1", "7"): t[A].clone()}), "layers.7.self_attn", "changes model."),
    "another layer": (lambda t: t.update({A.replace("q_", "x_"): t[A].clone()}), "x_proj.lora_A", "changes model."),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_an_adapter_lacks_or_has_too_much_is_named(kind: str, adapter: Path, tiny_model: Path) -> None:
    change, on, into = CHANGES[kind]
    with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    merged(tiny_model, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as put_on:
        with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert on in str(put_on.value)
    with pytest.raises(ModelError) as added:
        merged(tiny_model, adapter)
    assert into in str(added.value)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [(torch.zeros(2, 3), "size mismatch for"), (torch.ones(4, 64, dtype=torch.int8), "cannot be I8")],
)
def test_one_of_another_shape_or_kind_is_named(
    tensor: torch.Tensor, told: str, adapter: Path, tiny_model: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors") | {A: tensor}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=told) as caught:
        with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert "layers.1.self_attn.q_proj" in str(caught.value)
