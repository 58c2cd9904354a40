"""train.stages on a CUDA device: the base of one stage is gone before the next is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qft.commands.train import train
from qft.progress import View
from qft.recipe import load
from tests.support.models import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.gpu

RecipeFile = Callable[..., Path]
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_no_two_bases_are_on_the_device(optim: str, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path) -> None:
    tiny_llama(**WIDE).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    stages = [{"quant.mode": mode, "max_steps": 2} for mode in ("none", "8bit", "4bit")]
    path = recipe_file(
        quant=None,
        model={"path": str(tmp_path / "wide"), "device": "cuda"},
        data={"eval": str(chat_file)},
        train={"max_steps": ..., "stages": stages, "optim": optim, "report_to": []},
    )
    gc.collect()
    before = torch.cuda.memory_allocated()
    report = train(load(path), View())
    left = report.memory.moments["before_load"].gpu_allocated_bytes  # of the last stage; cuBLAS keeps its workspaces
    first, second, third = (stage.peak_bytes or 0 for stage in report.stages)
    assert left is not None
    assert left - before < 5 * 2**24 < 2**27 < first
    assert first > second > third
