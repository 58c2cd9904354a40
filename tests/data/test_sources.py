"""Files -> raw rows: what is read, where each row stands, and one clear error for what cannot be read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qft.data.sources import JSON_COLUMN, BadRow, Rows, decode, open_source
from qft.errors import DataError, MissingError
from qft.recipe import Source

BOM = b"\xef\xbb\xbf"


def opened(path: Path, **options: Any) -> Rows:
    return open_source(Source(path=str(path), **options))


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def found(path: Path, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """(place without the folder, fields) of each row that is not blank."""
    rows = opened(path, **options)
    fields = [(rows.place(i), decode(row)) for i, row in enumerate(rows.dataset)]
    return [(place.removeprefix(f"{path.parent}{os.sep}"), value) for place, value in fields if value is not None]


JSON_LINES = {
    "blank lines count": ('{"a": 1}\n\n  \n{"a": 2}\n', [(1, 1), (4, 2)]),
    "the last line needs no end": ('{"a": 1}\n{"a": 2}', [(1, 1), (2, 2)]),
    "rows need not share a schema": ('{"a": 1}\n{"a": "x", "b": []}\n', [(1, 1), (2, "x")]),
    "CRLF ends a line": ('{"a": 1}\r\n\r\n{"a": 2}\r\n', [(1, 1), (3, 2)]),
    "U+2028 and its kin end none": ('{"a": "x\u2028\u2029\x85y"}\n{"a": 2}\n', [(1, "x\u2028\u2029\x85y"), (2, 2)]),
    "a byte order mark is no text": (BOM + b'{"a": 1}\n{"a": 2}\n', [(1, 1), (2, 2)]),
    "escapes are decoded": ('{"a": "\\ud83c\\udf89 \\u00e9 \\\\u"}\n', [(1, "\U0001f389 \xe9 \\u")]),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.json"])
@pytest.mark.parametrize(("content", "rows"), JSON_LINES.values(), ids=JSON_LINES)
def test_json_lines_are_placed_by_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, rows: list[tuple[int, Any]]
) -> None:
    path = written(tmp_path, name, content)
    assert [(place, fields["a"]) for place, fields in found(path)] == [(f"{name}:{line}", a) for line, a in rows]


@pytest.mark.parametrize("start", [b"", BOM, b" \n\t"], ids=["plain", "byte order mark", "white space first"])
def test_a_json_array_is_placed_by_row(tmp_path: Path, start: bytes) -> None:
    path = written(tmp_path, "rows.json", start + '[{"a": 1},\n {"b": "é\u2028"}]'.encode())
    assert found(path) == [("rows.json: row 1", {"a": 1}), ("rows.json: row 2", {"b": "é\u2028"})]


CSV = {
    "leading zeros": ("a,b\n007,1.50\n", [{"a": "007", "b": "1.50"}]),
    "words that mean nothing": ("a,b\nNA,null\nnan,None\n", [{"a": "NA", "b": "null"}, {"a": "nan", "b": "None"}]),
    "quoted line breaks": ('a,b\n"x\ny",1\nz,2\n', [{"a": "x\ny", "b": "1"}, {"a": "z", "b": "2"}]),
    "quoted commas and quotes": ('a,b\n"x, ""y""",1\n', [{"a": 'x, "y"', "b": "1"}]),
    "CRLF": ("a,b\r\n1,2\r\n3,4\r\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
    "a byte order mark": (BOM + b"a,b\n1,2\n", [{"a": "1", "b": "2"}]),
    "empty cells": ('a,b\n1,\n"",2\n', [{"a": "1", "b": ""}, {"a": "", "b": "2"}]),
    "blank lines are no rows": ("\na,b\n\n1,2\n\n3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
    "a cell longer than the csv module's limit": (f"a\n{'x' * 140_000}\n", [{"a": "x" * 140_000}]),
    "an index without a name, as pandas writes it": (",a\n0,x\n", [{"Unnamed: 0": "0", "a": "x"}]),
    "a comma at each end": ("a,,\nx,,\n", [{"a": "x", "Unnamed: 1": "", "Unnamed: 2": ""}]),
    "one column of true and false": ("a\ntrue\nFalse\n", [{"a": "true"}, {"a": "False"}]),
}


@pytest.mark.parametrize(("content", "rows"), CSV.values(), ids=CSV)
def test_every_csv_cell_is_kept_as_the_text_that_it_is(
    tmp_path: Path, content: str | bytes, rows: list[dict[str, str]]
) -> None:
    path = written(tmp_path, "rows.csv", content)
    assert found(path) == [(f"rows.csv: row {i}", row) for i, row in enumerate(rows, start=1)]


def test_a_parquet_file_keeps_its_types_and_is_placed_by_row(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}, {"messages": [], "n": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    filled = [rows[0], {"messages": []}]
    places = ["rows.parquet: row 1", "rows.parquet: row 2"]
    assert found(tmp_path / "rows.parquet") == list(zip(places, filled, strict=True))


@pytest.mark.parametrize("name", ["notes.txt", "notes.md"])
@pytest.mark.parametrize(
    ("sample_by", "rows"),
    [
        ("line", [(":1", "# é\u2028x"), (":2", "b"), (":4", "c")]),
        ("paragraph", [(": paragraph 1", "# é\u2028x\nb"), (": paragraph 2", "c\n")]),
        ("document", [(": document 1", "# é\u2028x\nb\n\nc\n")]),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_text_file_is_read_by(
    tmp_path: Path, name: str, sample_by: str, rows: list[tuple[str, str]], ends: str
) -> None:
    path = written(tmp_path, name, BOM + ends.join(["# é\u2028x", "b", "", "c", ""]).encode())
    assert found(path, sample_by=sample_by) == [(name + place, {"text": text}) for place, text in rows]


@pytest.mark.parametrize(
    "name", ["[1].jsonl", "*?.jsonl", "{a,b}.jsonl", "a b%20#.jsonl", "データ.jsonl", "x.zip.jsonl"]
)
def test_a_file_name_is_never_a_pattern(tmp_path: Path, name: str) -> None:
    written(tmp_path, "1.jsonl", '{"a": "the wrong file"}\n')
    assert found(written(tmp_path, name, '{"a": 1}\n')) == [(f"{name}:1", {"a": 1})]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '{"a": 1}\n')
    assert opened(path).digest == hashlib.sha256(b'{"a": 1}\n').hexdigest()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_a_file_that_changed_is_read_anew_even_if_its_time_did_not(tmp_path: Path, name: str) -> None:
    seen = []
    for content in ("x\n1\n", "x\n2\n"):
        path = written(tmp_path, name, content)
        os.utime(path, (1e9, 1e9))
        seen.append(list(opened(path).dataset))
    assert seen[0] != seen[1]


def test_a_compressed_file_that_changed_is_unpacked_anew(tmp_path: Path) -> None:
    seen = [
        list(opened(written(tmp_path, "rows.jsonl", gzip.compress(content))).dataset[JSON_COLUMN])
        for content in (b'{"a": 1}\n', b'{"a": 2}\n')
    ]
    assert seen == [['{"a": 1}'], ['{"a": 2}']]


UNREADABLE = {
    "an empty file": ("rows.jsonl", b"", "empty"),
    "an empty parquet file": ("rows.parquet", b"", "empty"),
    "JSON lines that are not UTF-8": ("rows.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
    "a JSON array that is not UTF-8": ("rows.json", b'[{"a": "\xff"}]', "not UTF-8"),
    "CSV that is not UTF-8": ("rows.csv", b"a\nb\xff\n", "not UTF-8"),
    "text that is not UTF-8": ("rows.txt", b"caf\xe9\n", "not UTF-8"),
    "an unknown suffix": ("rows.xlsx", b"x", r"\.jsonl, \.json, \.csv"),
    "no suffix": ("rows", b"x", r"\.jsonl, \.json, \.csv"),
    "a broken JSON array": ("rows.json", b'[{"a": 1},\n{"a": }]', r"rows\.json:2: not valid JSON: .* column 7"),
    "a JSON array that stops": ("rows.json", b'[{"a": 1},\n', r"rows\.json:2: not valid JSON"),
    "a JSON array nested too deeply": ("rows.json", b"[" * 200_000, "nested too deeply"),
    "a broken parquet file": ("rows.parquet", b"PAR1 or not", "cannot be read: .*[Pp]arquet"),
    "a CSV file that is a header": ("rows.csv", b"a,b\n", "no row"),
    "a CSV file of blank lines": ("rows.csv", BOM + b"\n\n", "no row"),
    "a CSV file whose first row is too long": ("rows.csv", b"a,b\n1,2,3\n", "csv:2: 3 cells"),
    "a CSV file with a later row that is too long": ("rows.csv", b"a,b\n1,2\n1,2,3\n", "csv:3: 3 cells"),
    "a CSV file with two columns of one name": ("rows.csv", b"a,a\n1,2\n", "same name"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_one_line_names_the_file_that_cannot_be_read_and_why(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=reason) as caught:
        opened(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "a folder"])
def test_a_path_with_no_file_is_missing(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "rows.jsonl"
    if folder:
        path.mkdir()
    with pytest.raises(MissingError, match=r"rows\.jsonl: no such data file") as caught:
        opened(path)
    assert ("folder" in str(caught.value)) == folder


@pytest.mark.parametrize("name", ["someone/rows", "rows"])
def test_a_name_like_a_hub_id_is_missing_where_there_is_neither_file_nor_hub(name: str) -> None:
    with pytest.raises(MissingError, match=rf"^{name}: not a local file, and the hub dataset cannot be loaded: \S"):
        open_source(Source(path=name))


BAD_LINES = {
    "not JSON": ("{'a': 1}", "not valid JSON: .* at column 2"),
    "two objects": ('{"a": 1} {"b": 2}', "not valid JSON: Extra data at column 10"),
    "an array": ("[1]", "not list"),
    "a text": ('"hello"', "not str"),
    "null": ("null", "not NoneType"),
    "half a surrogate pair": ('{"a": ["x \\ud83c"]}', r"\\ud83c is half a character"),
    "nested too deeply": ("[" * 200_000, "nested too deeply"),
    "a key that is given twice": ('{"a": 1, "b": 2, "a": 1}', "a: given twice"),
    "one within": ('{"m": [{"role": "user", "x": {"role": 1, "role": 2}}]}', "role: given twice"),
    "one with escapes": ('{"a": 1, "\\u0061": 2}', "a: given twice"),
    "an endless number": ('{"a": ' + "1" * 10_000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_row_says_why(line: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        decode({JSON_COLUMN: line})


def test_a_json_array_keeps_its_items_as_they_are(tmp_path: Path) -> None:
    text = ' [ {"a": [1, "],["]}\n,\t{"a": "é\\n\\u00e9", "b": {}},{"a": 1, "a": 2} , 7, "x,", null\n]\n'
    rows = opened(written(tmp_path, "rows.json", text))
    assert [decode(row) for row in islice(rows.dataset, 2)] == [{"a": [1, "],["]}, {"a": "é\né", "b": {}}]
    assert len(rows.dataset) == len(json.loads(text))
    with pytest.raises(BadRow, match="a: given twice"):
        decode(rows.dataset[2])
    assert len(opened(written(tmp_path, "none.json", "[ ]")).dataset) == 0


def test_a_bad_item_of_a_json_array_spoils_no_other(tmp_path: Path) -> None:
    rows = opened(written(tmp_path, "rows.json", json.dumps([1, {"a": "\ud800"}, {"a": 2}])))
    for index in (0, 1):
        with pytest.raises(BadRow):
            decode(rows.dataset[index])
    assert decode(rows.dataset[2]) == {"a": 2}
