"""Examples that share a row, by a GPU's attention of variable lengths: loss and gradients as alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.attention.varlen import varlen_attn

from qft.data.batch import Collator
from qft.data.packing import PackedRows, best_fit
from qft.memory.packed import packs_as_alone, sequences_apart
from tests.support.families import tiny
from tests.support.models import tiny_llama

pytestmark = pytest.mark.gpu
LENGTHS = (3, 121, 9, 240, 77, 130, 2)


def batch(*, side_by_side: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    examples = [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "length": len(ids), "source": 0, "row": 0} for ids in drawn
    ]
    rows = PackedRows(Dataset.from_list(examples), best_fit(LENGTHS, 256))
    made = Collator(2, side_by_side=side_by_side)(list(rows))
    return {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in made.items()}


def learnt(model: Any, given: dict[str, Any], borders: Any) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    count = torch.tensor(sum(given["learnt_tokens"]))
    with sequences_apart(borders, model, given["input_ids"].shape[1]) as told:
        named = {name: given[name] for name in ("input_ids", "position_ids", "labels")}
        loss = model(**named, num_items_in_batch=count, use_cache=False, **told).loss
        loss.backward()
    return float(loss.detach()), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def alone(model: Any, given: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Each example by itself, in the same dtype."""
    model.zero_grad()
    total, count = 0.0, torch.tensor(sum(given["learnt_tokens"]))
    ids, labels = (given[name].flatten().tolist() for name in ("input_ids", "labels"))
    width, rows = given["input_ids"].shape[1], given["lengths"]
    starts = [sum(map(sum, rows[:n])) if len(given["input_ids"]) == 1 else n * width for n in range(len(rows))]
    for start, lengths in zip(starts, rows, strict=True):
        for length in lengths:
            part = slice(start, start + length)
            own = {"input_ids": torch.tensor([ids[part]]).cuda(), "labels": torch.tensor([labels[part]]).cuda()}
            if length > 1:
                loss = model(**own, num_items_in_batch=count, use_cache=False).loss
                loss.backward()
                total += float(loss.detach())
            start += length
    return total, torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def exact() -> Iterator[None]:
    """Products in float32 are, whatever a training before has asked for."""
    places: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    yield
    for place, own in zip(places, before, strict=True):
        place.fp32_precision = own


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_row_is_learnt_as_its_examples_alone(
    kind: str, side_by_side: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(**given: Any) -> Any:
        calls.append(given)
        return varlen_attn(**given)

    monkeypatch.setattr("qft.memory.packed.varlen_attn", noted)
    model = (tiny_llama() if kind == "llama" else tiny(kind)).to("cuda", dtype).train()
    tight = dtype == torch.float32
    for module in model.modules():
        if hasattr(module, "top_k") and not tight:
            module.top_k = model.config.num_local_experts  # all: among some, a tie in 16 bits can fall otherwise
    assert packs_as_alone(model)
    given = batch(side_by_side=side_by_side)
    borders = [sum(given["lengths"], ())] if side_by_side else given["lengths"]
    loss, slope = learnt(model, given, borders)
    wanted, own = alone(model, given)
    assert loss == pytest.approx(wanted, rel=1e-5 if tight else 2e-3)
    assert (slope - own).norm() <= (1e-3 if tight else 0.03) * own.norm()
    assert bool(calls) != tight, "16 bits by lengths, 32 by masks"
