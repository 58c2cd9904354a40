"""What is merged tensor by tensor is what peft merges in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.quant.delta import add_delta
from qft.recipe.load import from_values
from tests.support.models import byte_tokenizer, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
}


def adapted(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter of random numbers."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.5
    model.save_pretrained(folder)
    return folder


def weights_of(base: Path, adapter: Path | None) -> MergedWeights:
    values = {"model": {"path": str(base), "dtype": "float32"}, "data": {"train": "-"}, "output_dir": "-"}
    return MergedWeights(plan_model(from_values(values)), adapter, "float32", "original")


def whole(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """As peft merges it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_one_that_peft_merges(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    adapter = adapted(tmp_path / "adapter", tiny_model, **KINDS[kind])
    weights, expected = weights_of(tiny_model, adapter), whole(tiny_model, adapter)
    read = weights.reader()
    assert set(weights.names) == set(expected)
    for name in weights.names:
        torch.testing.assert_close(read(name), expected[name], rtol=1e-5, atol=1e-6)
    plain = weights_of(tiny_model, None).reader()
    changed = {name for name in weights.names if not torch.equal(read(name), plain(name))}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj", *KINDS[kind].get("modules_to_save", [])}


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_tied_tensors_have_two_names_and_are_written_once(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    tied = weights_of(tmp_path / "tied", None)
    read = tied.reader()
    assert torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight"))
    assert "lm_head.weight" not in tied.names
    adapter = adapted(tmp_path / "adapter", tmp_path / "tied", modules_to_save=["lm_head"])
    split = weights_of(tmp_path / "tied", adapter)
    assert "lm_head.weight" in split.names
    assert (tied.config.tie_word_embeddings, split.config.tie_word_embeddings) == (True, False)


def test_dora_scales_each_row_to_its_magnitude() -> None:
    weight, delta, magnitude = torch.eye(2), torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.tensor([10.0, 3.0])
    assert torch.equal(add_delta(weight, delta), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    torch.testing.assert_close(add_delta(weight, delta, magnitude), torch.tensor([[6.0, 8.0], [0.0, 3.0]]))
