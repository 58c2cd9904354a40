"""data.streaming: rows that are read while they are learnt come in one order, from any number on, in little memory."""

from __future__ import annotations

import functools
import gzip
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qft.data import stream
from qft.data.prepare import prepare
from qft.data.stream import BLOCK, Stream, find_lines
from qft.distributed.rows import Filled
from qft.errors import DataError
from qft.recipe import Source
from qft.recipe.data import DataSection
from tests.support.cli import qft
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl
from tests.support.runs import adapter

RecipeFile = Callable[..., Path]
ROWS = 5 * BLOCK + 20


def opened(*sources: Any, length: int = 4000, shuffled: bool = True, **data: Any) -> Stream:
    section = DataSection.model_validate({"train": [*sources], "streaming": True, "max_length": 128, **data})
    found = prepare(section, byte_tokenizer(), 3).stream
    assert found is not None
    return found.asked(length, shuffled=shuffled)


@pytest.fixture(autouse=True)
def _smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SAMPLE", 3 * BLOCK)
    monkeypatch.setattr(stream, "BLOCKS", 2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a blank line, and one that is no row, far behind the first."""
    path = tmp_path_factory.mktemp("stream") / "rows.jsonl"
    lines = [json.dumps(chat(f"ask {i}", f"it is {i}")) for i in range(ROWS)]
    lines[220], lines[250] = "", "{"
    path.write_text("\n".join(lines))
    return path


def test_blocks_begin_where_lines_do(tmp_path: Path) -> None:
    texts = [f"{i}é" * (i % 7) for i in range(3 * BLOCK + 5)]
    for end in ("", "\n"):
        for mark in ("", "\ufeff"):
            path = tmp_path / "rows.txt"
            path.write_bytes((mark + "\r\n".join([*texts, "last"]) + end).encode())
            lines = find_lines(Source(path=str(path)))
            assert [text for block in range(4) for text in lines.read(block)] == [*texts, "last"]
            assert lines.lines == len(texts) + 1
            assert len(lines.starts) == 5


def test_blocks_of_a_file_that_is_read_in_parts_are_known_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    texts = [f"{i} " * 40 for i in range(2**15)]
    path.write_text("\n".join(texts))
    assert path.stat().st_size > 2**22
    lines = find_lines(Source(path=str(path)))
    assert [text for block in range(len(lines.sums)) for text in lines.read(block)] == texts
    path.write_text("\n".join([*texts[:-1], "x" * len(texts[-1])]))
    assert lines.read(0) == texts[:BLOCK]
    with pytest.raises(DataError, match=f"rows.txt:{2**15 - BLOCK + 1}: the file has changed since it was first read"):
        lines.read(len(lines.sums) - 1)


def test_bytes_that_are_no_text_are_told_when_they_come(tmp_path: Path) -> None:
    raw = [b"\xff" if i == 300 else b"text" for i in range(ROWS)]
    texts = pa.Array.from_buffers(pa.string(), ROWS, pa.array(raw).buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    found = opened({"path": str(tmp_path / "rows.parquet")}, shuffled=False)
    assert found[200]["row"] == 200
    with pytest.raises(DataError, match=r"rows\.parquet: row 301: text: not UTF-8 text"):
        found[290]


def test_a_line_that_others_would_part_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    with pytest.raises(DataError, match=r"rows\.txt:2: a carriage return within it: .*data\.streaming to false"):
        opened(str(path))


def test_each_pass_has_every_row_once_in_an_order_of_its_own(rows: Path) -> None:
    found = opened(str(rows), on_bad_row="skip")
    used = ROWS - 2
    numbers = [found[i]["row"] for i in range(2 * used)]
    passes = numbers[:used], numbers[used:]
    expected = sorted({*range(ROWS)} - {220, 250})
    assert [sorted(each) for each in passes] == [expected] * 2
    assert passes[0] != passes[1]
    assert sum(b == a + 1 for a, b in pairwise(passes[0])) < used / 20
    found = opened(str(rows), on_bad_row="skip")
    assert [found[i]["row"] for i in (used + 7, 3, 200)] == [numbers[i] for i in (used + 7, 3, 200)]
    found = found.asked(used, shuffled=False)
    assert [example["row"] for example in found] == expected


def test_it_encodes_what_is_encoded_without(rows: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:200]))
    whole = prepare(DataSection.model_validate({"train": str(few), "max_length": 128}), byte_tokenizer(), 3).train
    found = opened(str(few), shuffled=False)
    assert [found[i] for i in range(200)] == whole.to_list()


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=50)
    return {"path": str(folder / "rows.parquet")}


def as_csv(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    pa.csv.write_csv(pa.Table.from_pylist(rows), folder / "rows.csv")
    return {"path": str(folder / "rows.csv")}


def as_saved(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=3)
    return {"path": str(folder / "saved")}


def as_packed(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return {"path": str(folder / "rows.jsonl.gz")}


def as_sqlite(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(folder / "rows.db")) as made:
        made.execute("CREATE TABLE rows (prompt TEXT, completion TEXT)")
        made.executemany("INSERT INTO rows VALUES (:prompt, :completion)", rows)
        made.commit()
    return {"path": str(folder / "rows.db"), "sql": "SELECT * FROM rows"}


ASKED = [{"prompt": f"ask {i}", "completion": f"it is {i}" if i != 200 else " "} for i in range(ROWS)]


@functools.cache
def of_lines() -> list[dict[str, Any]]:
    """Two passes over a file of lines."""
    with TemporaryDirectory() as folder:
        lines = opened(str(write_jsonl(Path(folder) / "rows.jsonl", ASKED)), on_bad_row="skip")
        return [lines[i] for i in range(2 * ROWS)]


@pytest.mark.parametrize("write", [as_parquet, as_csv, as_saved, as_packed, as_sqlite])
def test_other_sources_are_streamed_as_files_of_lines_are(
    write: Callable[[list[dict[str, Any]], Path], dict[str, Any]], tmp_path: Path
) -> None:
    source = write(ASKED, tmp_path)
    found = opened(source, on_bad_row="skip")
    # Their blocks are the same; how many share a window goes by their bytes, which are few.
    numbers = [found[i] for i in range(2 * ROWS)]
    assert numbers == of_lines()
    anew = opened(source, on_bad_row="skip")
    assert anew[ROWS + 7] == numbers[ROWS + 7]
    assert found.lines == ROWS
    with pytest.raises(DataError, match=r"rows\.\S+(: row |:)201: completion: is empty|saved: row 201: completion"):
        opened(source, shuffled=False)[220]


def test_each_of_several_processes_takes_numbers_of_its_own(rows: Path) -> None:
    found = opened(str(rows), length=100, on_bad_row="skip")
    taken = [example for first in (0, 50) for example in Filled(found).__getitems__(range(first, first + 50))]
    assert [example["row"] for example in taken] == [found[i]["row"] for i in range(100)]


def test_weights_say_how_often_blocks_come(rows: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat(f"say {i}", "no") for i in range(4 * BLOCK)])
    few = write_jsonl(tmp_path / "few.jsonl", [chat(f"do {i}", "so") for i in range(2 * BLOCK)])
    found = opened({"path": str(other), "weight": 0.5}, {"path": str(few), "weight": 2}, length=6 * BLOCK)
    counts = [[found[i]["source"] for i in range(6 * BLOCK)].count(source) for source in (0, 1)]
    assert counts == [2 * BLOCK, 4 * BLOCK]


def test_packed_rows_are_full_and_hold_every_example(rows: Path) -> None:
    found = opened(str(rows), on_bad_row="skip", packing=True)
    packs: list[list[Any]] = []
    while sum(map(len, packs)) < ROWS - 2:
        packs.append(found[len(packs)])
    assert sorted(example["row"] for pack in packs for example in pack) == sorted({*range(ROWS)} - {220, 250})
    sizes = [sum(example["length"] for example in pack) for pack in packs]
    assert max(sizes) <= 128
    assert sum(sizes) > 0.7 * 128 * len(sizes)


def test_a_bad_row_ends_it_where_it_comes_by_its_place(rows: Path, tmp_path: Path) -> None:
    found = opened(str(rows), shuffled=False)
    assert found[100]["row"] == 100
    with pytest.raises(DataError, match=r"rows\.jsonl:251: not valid JSON: .*data\.on_bad_row"):
        found[260]
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(DataError, match="no row is left to use"):
        opened(str(nothing), on_bad_row="skip")[0]


def test_a_window_is_of_a_bounded_size(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(str(rows)).windows(0)
    assert [len(window) for window in whole] == [2, 2, 2]
    monkeypatch.setattr(stream, "BYTES", 10_000)
    files, few = [find_lines(Source(path=str(rows)))], opened(str(rows)).windows(0)
    sizes = [sum(files[file].starts[block + 1] - files[file].starts[block] for file, block in each) for each in few]
    assert max(sizes) < 10_000 + 7_000
    assert sorted(map(tuple, np.concatenate(few).tolist())) == sorted(map(tuple, np.concatenate(whole).tolist()))


def test_a_run_that_was_cut_off_goes_on_at_the_very_row(recipe_file: RecipeFile, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"ask {i}", f"it is {i}") for i in range(100)])
    sections: dict[str, Any] = {
        "quant": None,
        "data": {"train": str(rows), "streaming": True, "max_length": 64},
        "train": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report_to": []},
    }
    whole = recipe_file("whole.yaml", **sections, output_dir=str(tmp_path / "whole"))
    assert qft("train", whole).exit_code == 0
    cut = {**sections, "train": sections["train"] | {"max_steps": 2}}
    assert qft("train", recipe_file("cut.yaml", **cut, output_dir=str(tmp_path / "cut"))).exit_code == 0
    again = qft("train", recipe_file("again.yaml", **sections, output_dir=str(tmp_path / "cut")), "--resume")
    assert again.exit_code == 0, again.stderr
    one, other = (adapter(tmp_path / name) for name in ("whole", "cut"))
    assert all((one[name] == other[name]).all() for name in one)


REFUSED = {
    "max_steps": ({"train": {"max_steps": ...}}, "train.max_steps: data.streaming counts no rows"),
    "eval_fraction": ({"data": {"eval_fraction": 0.5}}, "data.eval_fraction: draws among all rows"),
    "by length": (
        {"train": {"train_sampling_strategy": "group_by_length"}},
        "train.train_sampling_strategy: group_by_length orders all rows",
    ),
    "an array": ({"data": {"train": "rows.json"}}, "data.streaming: reads some rows at a time"),
    "documents": ({"data": {"train": {"path": "a.txt", "sample_by": "document"}}}, "set its sample_by to line"),
    "a mixture by size": ({"data": {"mix_by": "tokens"}}, "data.mix_by: needs the size of every source"),
    "stages": ({"train": {"stages": [{"max_steps": 1}, {"max_steps": 1}], "max_steps": ...}}, "data.streaming: cannot"),
}


@pytest.mark.parametrize(("sections", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_on_a_stream_is_refused_by_its_field(
    recipe_file: RecipeFile, sections: dict[str, Any], reason: str
) -> None:
    data = {"streaming": True} | sections.get("data", {})
    result = qft("check", recipe_file(**sections | {"data": data}))
    assert result.exit_code == 2
    assert reason in result.stderr
