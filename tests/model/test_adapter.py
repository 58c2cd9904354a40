"""Adapters that a run or --adapter brings: each of their tensors has its place in the base, or they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qft.errors import ModelError
from qft.model.target import load_target, parse_target
from tests.support.architectures import MODELS, write_model

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def saved_adapter(folder: Path, kind: str, **settings: Any) -> Path:
    """An adapter whose B is not zero, so that putting it on changes the model."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | settings)
    get_peft_model(MODELS[kind](), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_an_adapter_that_fits_is_put_on(kind: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", kind), saved_adapter(tmp_path / "adapter", kind)
    target = parse_target(str(base), adapter=adapter, data=None)
    model = load_target(target, target.plan())
    held = {name for name in model.state_dict() if "lora_B" in name}
    assert len(held) == len([name for name in load_file(adapter / "adapter_model.safetensors") if "lora_B" in name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({KEY.replace("layers.1", "layers.7"): tensors[KEY].clone()}),
            r"layers.7.*no module",
        ),
        (lambda tensors: tensors.update({KEY.replace("up_proj", "up_porj"): tensors.pop(KEY)}), r"up_porj.*no module"),
        (lambda tensors: tensors.pop(KEY), r"it holds no .*layers.1.mlp.up_proj.lora_A"),
        (lambda tensors: tensors.pop("base_model.model.lm_head.weight"), "it holds no .*lm_head"),
        (lambda tensors: tensors.update({KEY: tensors[KEY][:, :8].contiguous()}), "size mismatch for .*up_proj"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}),
            "up_proj.lora_A.weight cannot be torch.int8",
        ),
    ],
)
def test_a_tensor_without_its_place_is_refused_before_the_base_is_loaded(
    change: Change, message: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = saved_adapter(tmp_path / "adapter", "llama", modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as caught:
        parse_target(str(base), adapter=adapter, data=None).plan()
    assert str(adapter) in str(caught.value)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", "gpt_neox"), saved_adapter(tmp_path / "adapter", "llama")
    with pytest.raises(ModelError, match="does not fit this base"):
        parse_target(str(base), adapter=adapter, data=None).plan()


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", "llama"), saved_adapter(tmp_path / "adapter", "llama")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="does not fit this base"):
        parse_target(str(base), adapter=adapter, data=None).plan()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": "four"}))
    with pytest.raises(ModelError, match="does not fit this base"):
        parse_target(str(base), adapter=adapter, data=None).plan()
