"""Checkpoints of models whose weights have other names on disk than in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

from qft.commands.train import train
from qft.errors import RunError
from qft.recipe import load
from qft.run.checkpoint import HASHES
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl
from tests.support.runs import Leaves, run

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)),
}
TRAIN = {"max_steps": 6, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
TRAIN |= {"save_steps": 1, "save_total_limit": None, "report_to": [], "load_best_model_at_end": True}


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_come_back(name: str, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    for part in (MODELS[name](), byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    data = {"eval": str(write_jsonl(tmp_path / "held.jsonl", [chat("say", "QWXZ")] * 2))}
    changes: dict[str, Any] = {"model": {"path": str(tmp_path / "base"), "dtype": "float32"}, "data": data}
    changes |= {"quant": None, "adapter": {"kind": "none", "r": ...}, "train": TRAIN}
    path = recipe_file(**changes, output_dir=str(tmp_path / "whole"))
    whole = train(load(path), Leaves(tmp_path / "whole", {5: "run"}))
    assert whole.eval.after is not None
    assert whole.eval.after.loss == pytest.approx(min(evaluation.loss for evaluation in whole.eval.history), rel=1e-5)
    part = recipe_file(**changes)
    weights = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors"
    (weights.parent / HASHES).unlink()
    kept = load_file(weights)
    save_file({key: kept[key] for key in list(kept)[1:]}, weights, {"format": "pt"})
    with pytest.raises(RunError, match=f"1 weights of the checkpoint are not those of the model, {next(iter(kept))}"):
        run(part, resume=True)
    save_file(kept, weights, {"format": "pt"})
    resumed = run(part, resume=True)
    assert (resumed.loss, resumed.eval) == (whole.loss, whole.eval)
    one, other = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
