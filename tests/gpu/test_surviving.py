"""Memory that runs out on a CUDA device, by the allocator's own limit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from qft.documents.training import Report
from tests.support.memory import above, exhausted, optimizer_fails
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

pytestmark = pytest.mark.gpu

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe whose activations are most of its memory: rows of some 1,800 tokens, and wide blocks."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    model = tiny_llama(max_position_embeddings=2048, **wide)
    model.save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    rows = [chat(f"say {i}", f"{i:03} " * 450) for i in range(32)]
    data = {"train": str(write_jsonl(tmp_path / "long.jsonl", rows)), "max_length": 2048}

    def write(folder: str, rows_at_once: int, **sections: Any) -> Path:
        settings = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": 8 // rows_at_once}
        settings |= {"max_steps": 4, "report_to": []} | sections.pop("train", {})
        model = {"path": str(tmp_path / "wide"), "device": "cuda"} | sections.pop("model", {})
        output = str(tmp_path / folder)
        return recipe_file(f"{folder}.yaml", model=model, data=data, train=settings, output_dir=output, **sections)

    return write


@contextmanager
def limited(count: int) -> Iterator[None]:
    """The allocator gives no more than `count` bytes."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(count / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def alone(path: Path) -> Report:
    """A run that finds nothing of an earlier one reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    return run(path)


def assert_close(one: Report, other: Report, relative: float) -> None:
    assert one.tokens == other.tokens
    losses = [[loss for _, loss, _, _ in report.loss.history] for report in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=relative)


def test_a_step_that_does_not_fit_is_made_again_by_halves(recipe: RecipeFile) -> None:
    whole, half = alone(recipe("whole", 8)), alone(recipe("half", 4))
    most, least = whole.memory.peak_gpu_bytes, half.memory.peak_gpu_reserved_bytes
    assert least < most, "the work is too small to tell"
    held: dict[int, int] = {}

    def note(module: Any, inputs: Any) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            held.setdefault(len(inputs[0]), torch.cuda.memory_allocated())

    handle = register_module_forward_pre_hook(note)
    try:
        with limited((most + least) // 2):
            report = run(recipe("run", 8))
    finally:
        handle.remove()
    [event] = report.out_of_memory
    assert (event.step, event.was, event.now, event.gradient_accumulation_steps) == (1, 8, 4, 2)
    assert event.asked_bytes
    assert held[4] <= held[8]
    assert report.memory.peak_gpu_reserved_bytes <= (most + least) // 2
    assert_close(report, whole, 0.02)


def test_it_goes_on_checkpointed_where_one_row_is_too_much(recipe: RecipeFile) -> None:
    whole = alone(recipe("whole", 1))
    least = alone(recipe("least", 1, train={"gradient_checkpointing": True}))
    most, enough = whole.memory.peak_gpu_bytes, least.memory.peak_gpu_reserved_bytes
    assert enough < most, "the work is too small to tell"
    with limited((most + enough) // 2):
        report = run(recipe("run", 8))
    assert report.out_of_memory[-1].field == "train.gradient_checkpointing"
    assert_close(report, whole, 0.02)


def test_the_scale_of_the_loss_survives(recipe: RecipeFile) -> None:
    """In the forward pass, in the backward pass, and after gradients were unscaled."""
    half: dict[str, Any] = {"model": {"dtype": "float16"}, "quant": {"compute_dtype": "float16"}}
    half["train"] = {"fp16": True, "max_steps": 8}
    whole = run(recipe("whole", 8, **half))
    with exhausted(above(4), phase="backward"), optimizer_fails(1, 3):
        report = run(recipe("run", 8, **half))
    assert [event.phase for event in report.out_of_memory] == ["backward", "optimizer", "optimizer"]
    assert_close(report, whole, 0.02)
