"""Each row once, by as many batches in each process."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard  # type: ignore[import-untyped]
from datasets import Dataset
from torch.utils.data import BatchSampler, SequentialSampler

from qft.distributed.rows import FILLER, Filled, FilledBatches


@pytest.mark.parametrize("count", [1, 7, 11, 12, 13])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_take_what_one_does(count: int, processes: int) -> None:
    rows = Filled(Dataset.from_dict({"input_ids": [[i] * 9 for i in range(count)], "source": [0] * count}).map(learnt))
    batches = BatchSampler(SequentialSampler(range(count)), 3, drop_last=False)
    shards = [[*BatchSamplerShard(FilledBatches(batches, processes), processes, rank)] for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(len(batch) == 3 for shard in shards for batch in shard)
    taken = [rows.__getitems__(batch) for turn in zip(*shards, strict=True) for batch in turn]
    real = [[row["input_ids"][0] for row in batch if row["source"] != FILLER] for batch in taken]
    assert [batch for batch in real if batch] == [*batches]
    assert all(set(row["labels"]) == {-100} for batch in taken for row in batch if row["source"] == FILLER)
    assert len(rows) == count


def test_a_filler_has_no_images() -> None:
    """Its tokens end before those that would stand for them."""
    row = {"input_ids": [1] * 9, "labels": [1] * 9, "images": ["a.png"], "source": 0}
    rows = Filled(Dataset.from_list([row]))
    assert rows[1]["images"] == []
    assert rows[0]["images"] == ["a.png"]


def learnt(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": row["input_ids"], "length": 9}
