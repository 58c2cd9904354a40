"""Examples that share a row: none sees another, each is learnt as it is alone, and steps count full rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from qft.commands.train import train
from qft.data.batch import Collator
from qft.data.packing import PackedRows, best_fit
from qft.errors import ModelError, RecipeError
from qft.memory.packed import cannot_pack, packs_as_alone, sequences_apart
from qft.plan import make_plan
from qft.recipe import load
from qft.training.surviving import rows_of
from tests.support.architectures import MODELS, write_model
from tests.support.families import tiny
from tests.support.models import plain_loss, tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import Leaves, run
from tests.support.tiny import tiny_skeleton, write_tiny_model

RecipeFile = Callable[..., Path]
LENGTHS = (3, 21, 9, 40, 17, 30, 2)
ROOM = 64


def example(length: int, number: int) -> dict[str, Any]:
    ids = np.random.default_rng(number).integers(3, 250, length).tolist()
    labels = [-100 if i < length // 3 else token for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "length": length, "source": 0, "row": number}


def packed() -> PackedRows:
    examples = Dataset.from_list([example(length, number) for number, length in enumerate(LENGTHS)])
    return PackedRows(examples, best_fit(LENGTHS, ROOM))


def with_window(kind: str) -> Any:
    """A model of Gemma 3's layers, or Mistral's, whose window is shorter than the rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6)
    return AutoModelForCausalLM.from_config(config)


MADE: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gemma": lambda: with_window("gemma3_text"),
    "mistral": lambda: with_window("mistral"),
    "qwen": lambda: with_window("qwen3"),
    "mixtral": lambda: tiny("mixtral"),
    "gpt2": MODELS["gpt2"],
}


def losses(model: Any, rows: list[Any], *, side_by_side: bool) -> list[float]:
    """Sums over each example of packed rows, in their order."""
    batch = Collator(2, side_by_side=side_by_side)(rows)
    flat = [length for row in batch["lengths"] for length in row]
    borders, width = [flat] if side_by_side else batch["lengths"], batch["input_ids"].shape[1]
    with torch.no_grad(), sequences_apart(borders, model, width) as told:
        given = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = model(**given, use_cache=False, **told).logits
    of_tokens = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    of_rows = torch.cat([torch.zeros(len(logits), 1), of_tokens.view(len(logits), -1)], 1)
    return [float(part.sum()) for row, own in zip(of_rows, borders, strict=True) for part in row[: sum(own)].split(own)]


@pytest.mark.parametrize("kind", MADE)
def test_each_example_costs_what_it_does_alone(kind: str) -> None:
    model, rows = MADE[kind]().eval(), packed()
    assert len(rows) < len(LENGTHS)
    assert cannot_pack(model) is None
    assert packs_as_alone(model)
    examples = [each for row in rows for each in row]
    alone = [plain_loss(model, [each]) * sum(label >= 0 for label in each["labels"][1:]) for each in examples]
    for side_by_side in (False, True):
        found = losses(model, list(rows), side_by_side=side_by_side)
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_a_model_that_sees_across_borders_is_found_out() -> None:
    assert not packs_as_alone(MODELS["opt"]()), "its masks know no positions"


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next", "rwkv", "lfm2_moe"])
def test_layers_that_pass_on_a_state_are_told_before_loading(kind: str) -> None:
    reason = cannot_pack(tiny_skeleton(kind))
    assert reason is not None
    assert "pass on what came before" in reason


def test_positions_that_nobody_reads_are_told_before_loading() -> None:
    assert "takes no position_ids" in (cannot_pack(MODELS["bloom"]()) or "")


def test_rows_are_filled_by_the_longest_first() -> None:
    packs = best_fit([5, 1, 6, 4, 2, 2], 10)
    assert packs == [[0, 1, 4, 5], [2, 3]], "two rows of ten, without a gap"
    lengths = np.random.default_rng(0).integers(1, 100, 5000).tolist()
    packs = best_fit(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(5000))
    assert max(sum(lengths[index] for index in pack) for pack in packs) <= 100
    assert len(packs) <= 1.02 * sum(lengths) / 100
    assert best_fit(lengths, 100) == packs


@pytest.mark.parametrize("side_by_side", [False, True])
def test_part_of_a_packed_batch_is_what_the_collator_makes_of_it(side_by_side: bool) -> None:
    collate, rows = Collator(2, side_by_side=side_by_side), list(packed())
    batch = collate(rows)
    for start, stop in ((0, 1), (1, 3), (0, len(rows))):
        part, alone = rows_of(batch, start, stop, collate), collate(rows[start:stop])
        assert part.keys() == alone.keys()
        for name, value in alone.items():
            same = torch.equal(part[name], value) if isinstance(value, torch.Tensor) else part[name] == value
            assert same, name


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> Callable[..., Path]:
    def made(folder: str, data: dict[str, Any], train: dict[str, Any] | None = None, **sections: Any) -> Path:
        rows = write_jsonl(tmp_path / "mixed.jsonl", [chat(f"Word {n}?", "yes " * (1 + 5 * n % 13)) for n in range(12)])
        settings = {"max_steps": 1, "report_to": [], "save_strategy": "no", **(train or {})}
        return recipe_file(
            data={"train": str(rows), "max_length": 128, **data},
            train=settings,
            output_dir=str(tmp_path / folder),
            **sections,
        )

    return made


def test_a_packed_training_counts_rows_that_are_full(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One step over everything: its loss is that of all examples alone."""
    plan = make_plan(load(recipe("a", {"packing": True}, {"gradient_accumulation_steps": 1, "max_steps": -1})))
    rows = plan.data.batched
    assert len(rows) < len(plan.data.train) == 12
    assert plan.document().data.packed_rows == len(rows)
    assert plan.steps == -(-len(rows) // plan.recipe.train.micro_batch)
    settings = {"per_device_train_batch_size": len(rows), "gradient_accumulation_steps": 1, "chunked_loss": True}
    plain = run(recipe("b", {}, {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}))
    for number, data in enumerate(({"packing": True}, {"packing": True, "padding_free": True})):
        report = run(recipe(f"c{number}", data, settings))
        assert report.steps == 1
        assert report.samples == 12
        assert report.supervised_tokens == plain.supervised_tokens
        assert report.tokens == plain.tokens
        assert report.loss.first == pytest.approx(plain.loss.first, rel=2e-3)
        assert report.throughput.padding_share < plain.throughput.padding_share


def test_rows_of_a_batch_lie_side_by_side_without_padding(recipe: Callable[..., Path]) -> None:
    report = run(recipe("a", {"padding_free": True}, {"train_sampling_strategy": "group_by_length", "max_steps": 2}))
    assert report.throughput.padding_share == 0
    assert report.samples == 8


def test_what_cannot_be_packed_is_refused_by_its_field(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mamba = write_tiny_model(tmp_path / "mamba", "mamba")
    asked = {"model": {"path": str(mamba)}, "adapter": {"target_modules": ["in_proj"]}}
    with pytest.raises(RecipeError, match=r"data\.packing: MambaForCausalLM has layers that pass on"):
        make_plan(load(recipe("a", {"packing": True}, **asked)))
    opt = write_model(tmp_path / "opt", "opt")
    with pytest.raises(ModelError, match=r"OPTForCausalLM answers otherwise .* set data\.padding_free to false"):
        run(recipe("b", {"padding_free": True}, model={"path": str(opt)}))
    with pytest.raises(RecipeError, match=r"train\.train_sampling_strategy: sequential"):
        make_plan(load(recipe("c", {"packing": True}, {"train_sampling_strategy": "sequential"})))
    with pytest.raises(RecipeError, match=r"train\.torch_compile: packed rows"):
        make_plan(load(recipe("d", {"padding_free": True}, {"torch_compile": True}, quant=None)))


def test_a_packed_run_goes_on_where_it_stopped(recipe: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
    whole = train(load(recipe("a", {"packing": True}, settings)), Leaves(tmp_path / "a", {3: "b"}))
    resumed = run(recipe("b", {"packing": True}, settings), resume=True)
    assert resumed.loss == whole.loss
    line = json.loads((tmp_path / "b" / "rows.jsonl").read_text().splitlines()[0])
    assert line["row"] == 0, "what a run keeps are rows, not what they were packed into"
