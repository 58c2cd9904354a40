"""memory.offload on a CUDA device: blocks are copied by a stream of their own while the one before is computed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.plan import make_plan
from qft.recipe import load
from tests.support.architectures import write_model
from tests.support.offloads import learnt, made, same
from tests.support.runs import MODES, run

pytestmark = pytest.mark.gpu

RecipeFile = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven blocks that take long enough to be overtaken."""
    folder = tmp_path_factory.mktemp("offload") / "base"
    return write_model(folder, "llama", num_hidden_layers=7, hidden_size=1024, intermediate_size=4096)


def sections(mode: str, base: Path, **train: Any) -> dict[str, Any]:
    """Attention in the one way whose gradients are the same each time."""
    model = {"path": str(base), "device": "cuda", "attn_implementation": "eager"} | MODES[mode].get("model", {})
    return {"model": model, "quant": MODES[mode]["quant"], "train": {"report_to": []} | train}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_resident_run(
    mode: str, offload: str, checkpointing: bool, base: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    asked = sections(mode, base, gradient_checkpointing=checkpointing)
    plans = (make_plan(load(recipe_file(memory=m, **asked))) for m in (None, {"offload": offload}))
    assert same(*(learnt(plan, tmp_path) for plan in plans))


@pytest.mark.parametrize(
    "adapter", [{"use_dora": True}, {"init_lora_weights": "loftq"}, {"target_modules": ["down_proj"]}]
)
def test_adapters_that_look_at_the_base(
    adapter: dict[str, Any], base: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    asked = sections("nf4", base, gradient_checkpointing=True) | {"adapter": adapter}
    plans = (make_plan(load(recipe_file(memory=m, **asked))) for m in (None, {"offload": "cpu"}))
    assert same(*(learnt(plan, tmp_path) for plan in plans))


@pytest.mark.parametrize("mode", ["nf4", "bf16"])
def test_far_less_is_allocated_while_loading_and_training(
    mode: str, base: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    """Two of seven blocks, one more in 16 bits while it is quantized, and what comes of 16 tokens."""
    peaks = []
    for memory in (None, {"offload": "cpu"}):
        plan = make_plan(load(recipe_file(memory=memory, **sections(mode, base, gradient_checkpointing=True))))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with made(plan, tmp_path) as model:
            ids = torch.arange(16, device="cuda").view(1, 16)
            model(input_ids=ids, labels=ids).loss.backward()
            if memory:
                assert not any(p.is_cpu for p in model.parameters())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    weights = 7 * (4 * 1024 * 512 + 3 * 1024 * 4096) * (2 if mode == "bf16" else 0.5)
    assert peaks[1] < peaks[0] - 0.5 * weights


def test_a_run_comes_to_the_same_loss_and_less_memory(base: Path, recipe_file: RecipeFile, chat_file: Path) -> None:
    # Weights that come and go are multiplied by their own code, and kernels of the same sums round otherwise.
    plain = {"full_determinism": True, "kernels": "plain"}
    asked = sections("nf4", base, gradient_checkpointing=True, max_steps=4, **plain)
    asked |= {"data": {"eval": str(chat_file)}, "eval": {"metrics": ["exact_match"], "max_new_tokens": 4, "samples": 2}}
    reports = []
    for offload in ("none", "cpu", "disk"):
        folder = str(recipe_file().parent / offload)
        reports.append(run(recipe_file(memory={"offload": offload}, output_dir=folder, **asked)))
    resident, *others = reports
    for report in others:
        assert report.loss == resident.loss
        assert report.eval.after == resident.eval.after
        assert report.memory.peak_gpu_bytes < resident.memory.peak_gpu_bytes
        assert report.memory.offloaded_bytes > 0
