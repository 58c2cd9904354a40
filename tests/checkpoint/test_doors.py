"""No door by which a model brings code in: neither pickles nor kernels of a hub are read unless the recipe says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Mistral3Config

from qft.checkpoint.find import find_checkpoint
from qft.errors import ModelError
from qft.model.target import parse_target
from qft.recipe import Recipe, load
from tests.support.models import tiny_llama


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder.parent / "recipe.yaml"
    path.write_text(f"model: {{path: {folder}}}\ndata: {{train: -}}\noutput_dir: run\n")
    return load(path, overrides).recipe


KERNEL = "someone/attention@main:forward"


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_configuration_cannot_have_a_kernel_fetched(field: str, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {field: KERNEL}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{KERNEL} fetched from a hub.*model\.trust_remote_code"):
        find_checkpoint(recipe(model))
    assert find_checkpoint(recipe(model, "model.trust_remote_code=true")).folder == model


def test_nor_can_one_within_it(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    whole: dict[str, Any] = Mistral3Config().to_dict() | {"attn_implementation": {"text_config": KERNEL}}
    (model / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match=KERNEL):
        find_checkpoint(recipe(model))


def test_an_adapter_that_is_pickled_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model"):
        parse_target(str(tiny_model), adapter=tmp_path / "adapter", data=None).plan()
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="its weights are pickled"):
        parse_target(str(tiny_model), adapter=tmp_path / "adapter", data=None).plan()
