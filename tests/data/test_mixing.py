"""Sources of many files and kinds, and how they are mixed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from qft.data.audit import audit
from qft.data.encoded import column
from qft.data.mixing import times_of
from qft.data.prepare import Prepared, prepare
from qft.data.sources import decode, open_source
from qft.errors import DataError, MissingError
from qft.recipe import Source, load
from qft.recipe.data import AuditSection, DataSection
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl

ROWS = [chat(f"say {n}", f"it is {n}") for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def prepared(train: Any, **data: Any) -> Prepared:
    section = DataSection.model_validate({"train": train, "max_length": 512} | data)
    return prepare(section, byte_tokenizer(), 0)


def zstd(path: Path, text: str, frames: int = 1) -> Path:
    parts = [text[len(text) * i // frames : len(text) * (i + 1) // frames].encode() for i in range(frames)]
    path.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts))
    return path


def stream(path: Path, table: pa.Table, opened: Callable[..., Any]) -> None:
    with opened(str(path), table.schema) as writer:
        writer.write_table(table)


def written(folder: Path, name: str) -> Path:
    path, table = folder / name, pa.Table.from_pylist(ROWS)
    match name.split(".", 1)[1]:
        case "jsonl.gz" | "json.gz":
            path.write_bytes(gzip.compress(LINES[:40].encode()) + gzip.compress(LINES[40:].encode()))
        case "jsonl.zst":
            zstd(path, LINES, frames=2)
        case "parquet":
            pq.write_table(table, path)
        case "stream.arrow":
            stream(path, table, pa.ipc.new_stream)
        case "file.arrow":
            stream(path, table, pa.ipc.new_file)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.stream.arrow", "a.file.arrow"]
)
def test_rows_are_the_same_however_they_are_kept(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    for _ in range(2):  # the second time from what was unpacked
        rows = open_source(Source(path=str(path)))
        assert [decode(row) for row in rows.dataset] == ROWS
    assert rows.place(1) == (f"{path}:2" if ".json" in name else f"{path}: row 2")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_or_wrong_is_told(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    whole = path.read_bytes()
    for content in (whole[:-9], b"no such thing", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{path}: cannot be read: \S"):
            open_source(Source(path=str(path)))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n1,2,3\n"))
    with pytest.raises(DataError, match=r"b\.csv\.gz:3: 3 cells, and the header has 2$"):
        open_source(Source(path=str(tmp_path / "b.csv.gz")))


def test_what_packed_files_hold_is_known_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for answer in ("one", "two"):
        path.write_bytes(gzip.compress(json.dumps(chat("q", answer)).encode()))
        assert [decode(row) for row in open_source(Source(path=str(path))).dataset] == [chat("q", answer)]


@pytest.mark.parametrize("train", ["{}/*.jsonl", "{}/**/[ab].jsonl", "{}"])
def test_each_file_of_a_pattern_or_folder_is_a_source(tmp_path: Path, train: str) -> None:
    (tmp_path / "rows").mkdir()
    files = [write_jsonl(tmp_path / "rows" / f"{name}.jsonl", [chat(name, "a\x00b")] * 2) for name in "ba"]
    found = prepared({"path": train.format(tmp_path / "rows"), "weight": 2.0})
    assert [(each.path, each.rows, each.weight) for each in found.sources] == [
        (str(file), 2, 2.0) for file in files[::-1]
    ]
    told = {finding.name: finding for finding in audit(found, AuditSection())}
    assert [place.rpartition(": ")[0] for place in told["control_characters"].places] == [
        f"{file}:{line}" for file in files[::-1] for line in (1, 2)
    ]
    write_jsonl(files[0], [chat("q", "a"), {"messages": []}])
    with pytest.raises(DataError, match=rf"{files[0]}:2: "):
        prepared(train.format(tmp_path / "rows"))


def test_a_pattern_in_a_recipe_stands_beside_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: m}\ndata:\n  train: ['*.jsonl', c.jsonl.gz]\noutput_dir: run\n"
    )
    sources = load(tmp_path / "recipe.yaml").recipe.data.train
    assert [source.path for source in sources] == [str(tmp_path / name) for name in ("b.jsonl", "c.jsonl.gz")]


def test_a_pattern_or_folder_of_nothing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"\*\.jsonl: no such data file$"):
        prepared(str(tmp_path / "*.jsonl"))
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("text\na\n")
    with pytest.raises(MissingError, match=r"a folder of \.csv and \.jsonl files: name those that are meant"):
        prepared(str(tmp_path))


def test_a_folder_that_datasets_saved_is_one_source(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_list(ROWS), "held": Dataset.from_list(ROWS[:1])}
    parts["train"].save_to_disk(tmp_path / "one")
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    sources = [{"path": str(tmp_path / "one")}, {"path": str(tmp_path / "both"), "split": "held"}]
    found = prepared(sources)
    assert [(each.rows, each.unit, bool(each.digest)) for each in found.sources] == [(3, "row", True), (1, "row", True)]
    assert found.place(0, 1) == f"{tmp_path / 'one'}: row 2"
    with pytest.raises(DataError, match=r"both: holds the splits train, held, and none is called test: set split"):
        prepared({"path": str(tmp_path / "both"), "split": "test"})
    with pytest.raises(DataError, match=r"one: holds one set of rows, and none is called held: remove split"):
        prepared({"path": str(tmp_path / "one"), "split": "held"})
    parts["none"] = Dataset.from_list(ROWS).select([])
    DatasetDict(parts).save_to_disk(tmp_path / "some")
    assert len(prepared({"path": str(tmp_path / "some"), "split": "train"}).train) == 3
    with pytest.raises(DataError, match=r"none: holds no row"):
        prepared({"path": str(tmp_path / "some"), "split": "none"})
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match=r"one: cannot be read as what"):
        prepared(sources)


def test_columns_are_called_as_the_format_has_them(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "prompt": "other"}, {"question": "r", "answer": "b"}]
    source = {
        "path": str(write_jsonl(tmp_path / "a.jsonl", rows)),
        "columns": {"question": "prompt", "answer": "completion"},
    }
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*two fields are prompt"):
        prepared(source)
    with pytest.raises(DataError, match="none of its first 100 rows has a field anser"):
        prepared(source | {"columns": {"anser": "completion"}})
    found = prepared(source, ignore_fields=["prompt"])
    assert found.sources[0].format == "prompt_completion"
    assert [len(each) for each in found.train["input_ids"]] == [len(found.train[0]["input_ids"])] * 2


@pytest.mark.parametrize("fields", [
    {"chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "completion": "a", "label": False},
    {"prompt": "q", "completion": "a", "label": "True"},
    {"messages": chat("q", "a")["messages"], "label": True},
    {"messages": chat("q", "a")["messages"], "kto_tag": False},
    {"chosen": [{"role": "user", "content": "q"}], "rejected": []},
])  # fmt: skip
def test_preferences_are_known_and_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: a preference .* none are trained yet .* columns .*ignore_fields"):
        prepared(str(write_jsonl(tmp_path / "a.jsonl", [fields])))


def test_the_chosen_answers_can_be_learnt_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    found = prepared({"path": str(path), "columns": {"chosen": "completion"}}, ignore_fields=["rejected"])
    assert byte_tokenizer().decode([label for label in found.train[0]["labels"] if label >= 0]) == "a<|im_end|>"


def test_shares_are_by_size_weight_and_temperature() -> None:
    sizes = [900, 100]
    assert times_of(sizes, [1, 1], 1) == pytest.approx([1, 1])
    assert times_of(sizes, [1, 9], 1) == pytest.approx([500 / 900, 5])
    assert times_of(sizes, [1, 1], 2) == pytest.approx([750 / 900, 2.5]), "roots: 30 to 10"
    assert times_of(sizes, [1, 1], 1000) == pytest.approx([500 / 900, 5], rel=1e-2)
    assert times_of([10, 0], [1, 1], 1) == [1, 1]


def test_sources_are_mixed_by_rows_or_tokens(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [chat("q", "a")] * 40)
    long = write_jsonl(tmp_path / "long.jsonl", [chat("q", "a" * 400)] * 10)
    train = [str(short), {"path": str(long), "weight": 4.0}]
    by_rows = prepared(train, mix_by="rows")
    assert Counter(by_rows.train["source"]) == {0: 25, 1: 25}
    assert [source.weight for source in by_rows.sources] == pytest.approx([25 / 40, 2.5])
    even = prepared([str(short), str(long)], mix_by="tokens", mix_temperature=1000.0)
    lengths, sources = column(even.train, "length"), column(even.train, "source")
    tokens = [int(lengths[sources == number].sum()) for number in (0, 1)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.1)
    assert sum(tokens) == pytest.approx(sum(source.tokens for source in even.sources), rel=0.1)
    assert list(sources) == sorted(sources), "one behind the other, for train.train_sampling_strategy: sequential"
