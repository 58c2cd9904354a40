"""Rows of SQLite files: what a query says, as it is, and nothing else."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qft.data.prepare import prepare
from qft.data.sources import Rows, decode, open_source
from qft.errors import DataError
from qft.recipe import Source
from qft.recipe.data import DataSection
from tests.support.cli import qft
from tests.support.models import byte_tokenizer

QUERY = "SELECT prompt, completion FROM rows WHERE good ORDER BY id"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "rows.db"
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE rows (id INTEGER, prompt TEXT, completion, good INTEGER, raw BLOB)")
        rows: list[tuple[Any, ...]] = [(i, f"ask {i}\u2028é", f"say {i}", i % 2, None) for i in range(20)]
        rows += [(20, "all", None, 1, None), (21, "some", 2**62 + 1, 1, b"\x00")]
        made.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", rows)
        made.commit()
    return path


def opened(path: Path, sql: str | None = QUERY) -> Rows:
    return open_source(Source(path=str(path), sql=sql))


def test_rows_are_what_the_query_says_in_its_order(database: Path) -> None:
    rows = opened(database)
    found = [decode(row) for row in rows.dataset]
    assert found[:10] == [{"prompt": f"ask {i}\u2028é", "completion": f"say {i}"} for i in range(1, 20, 2)]
    assert found[10:] == [{"prompt": "all"}, {"prompt": "some", "completion": 2**62 + 1}]
    assert rows.place(2) == f"{database}: row 3"


def test_a_file_that_has_changed_and_another_query_are_read_anew(database: Path) -> None:
    assert len(opened(database).dataset) == 12
    assert len(opened(database, "SELECT * FROM rows WHERE id < 3").dataset) == 3
    with closing(sqlite3.connect(database)) as changed:
        changed.execute("DELETE FROM rows WHERE id < 10")
        changed.commit()
    assert len(opened(database).dataset) == 7


WRONG = {
    "no query": (None, r"holds the tables rows: say what a row is \(sql: SELECT \* FROM rows\)"),
    "no such table": ("SELECT * FROM others", "sql: no such table: others"),
    "no SQL": ("rows", 'sql: near "rows": syntax error'),
    "nothing": ("", "sql: is no query"),
    "two statements": ("SELECT 1; SELECT 2", "sql: You can only execute one statement"),
    "one that deletes": ("DELETE FROM rows", "sql: not authorized"),
    "one that opens others": ("ATTACH '/tmp/other.db' AS other", "sql: not authorized"),
    "one that loads code": ("SELECT load_extension('x')", "sql: not authorized"),
    "a setting": ("PRAGMA writable_schema = 1", "sql: not authorized"),
    "two columns of one name": ("SELECT prompt, completion AS prompt FROM rows", "two of its columns have the same"),
    "bytes": ("SELECT prompt, raw FROM rows", r"sql: row 22: raw is a BLOB: leave it out, or CAST\(raw AS TEXT\)"),
}


@pytest.mark.parametrize(("sql", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_no_query_of_rows_is_told(database: Path, sql: str | None, reason: str) -> None:
    before = database.read_bytes()
    with pytest.raises(DataError, match=reason) as caught:
        opened(database, sql)
    assert str(caught.value).startswith(f"{database}: ")
    assert "\n" not in str(caught.value)
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir()] == ["rows.db"]


def test_a_file_that_is_none_or_is_being_written_is_told(database: Path) -> None:
    other = database.with_name("other.sqlite")
    other.write_bytes(b"not a database " * 100)
    with pytest.raises(DataError, match=r"other\.sqlite: .*file is not a database"):
        opened(other)
    with closing(sqlite3.connect(database)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("DELETE FROM rows")
        writer.commit()
        with pytest.raises(DataError, match=r"rows\.db: is being written \(rows\.db-wal has what is not in it yet\)"):
            opened(database)
    asked = DataSection.model_validate({"train": {"path": str(database), "sql": QUERY}, "max_length": 64})
    with pytest.raises(DataError, match="holds no row"):
        prepare(asked, byte_tokenizer(), 0)


REFUSED = {
    "a server": ({"path": "postgresql://me@there/rows"}, "data.train.0.path: postgresql:// is not read"),
    "an address": ({"path": "https://there/rows.jsonl"}, "data.train.0.path: https:// is not read"),
    "an address of SQLite": (
        {"path": "sqlite:///rows.db"},
        r"data.train.0.path: sqlite:// is not read: .*path: rows.db",
    ),
    "a query of no database": ({"path": "rows.jsonl", "sql": QUERY}, "data.train.0.sql: is asked of SQLite files"),
}


@pytest.mark.parametrize(("source", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_sqlite_file_is_refused_by_its_field(
    recipe_file: Callable[..., Path], source: dict[str, str], reason: str
) -> None:
    result = qft("check", recipe_file(data={"train": source}))
    assert result.exit_code == 2
    assert re.search(reason, result.stderr), result.stderr
