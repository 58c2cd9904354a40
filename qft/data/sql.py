"""Rows of a SQLite file, as one query says them.

`Dataset.from_sql` tells what it keeps of a connection by where that lies in memory, and pandas guesses the type of each
column anew every 10,000 rows. Here each row is JSON text of its own, as in .jsonl files, and what `datasets` keeps goes
by the file's content and the query.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from qft.errors import DataError, first_line

READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
"""All that a query may do; nothing is written, attached or loaded."""


def rows_of(path: Path, digest: str, sql: str | None, column: str) -> Dataset:
    """The rows of a query over the file of that SHA-256, each as JSON text in `column`. Raises DataError."""
    for journal in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-journal")):
        if journal.exists() and journal.stat().st_size:
            text = f"is being written ({journal.name} has what is not in it yet)"
            raise DataError(f"{path}: {text}: close it in the program that writes it")
    try:
        _require_query(path, sql)
        settings = {"path": str(path), "sql": sql, "column": column, "digest": digest}
        made: Dataset = Dataset.from_generator(
            _texts, gen_kwargs=settings, features=Features({column: Value("string")})
        )
    except (sqlite3.Error, sqlite3.Warning, DatasetsError) as error:
        raise DataError(f"{path}: {'sql: ' if sql else ''}{first_line(error.__cause__ or error)}") from error
    return made


def _require_query(path: Path, sql: str | None) -> None:
    """Raise DataError unless it is one, of columns that have names of their own."""
    with closing(_opened(path)) as connection:
        if sql is None:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            example = f"sql: SELECT * FROM {tables[0] if tables else 'rows'}"
            raise DataError(f"{path}: holds the tables {', '.join(tables) or '(none)'}: say what a row is ({example})")
        names = [each[0] for each in connection.execute(sql).description or ()]
    if not names:
        raise DataError(f"{path}: sql: is no query: it begins with SELECT")
    if len({*names}) < len(names):
        raise DataError(f"{path}: sql: two of its columns have the same name: give each its own by AS")


def _opened(path: Path) -> sqlite3.Connection:
    """To be read alone; no file is made beside it."""
    connection = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)
    connection.set_authorizer(lambda what, *_: sqlite3.SQLITE_OK if what in READS else sqlite3.SQLITE_DENY)
    return connection


def _texts(path: str, sql: str, column: str, digest: str) -> Iterator[dict[str, str]]:
    with closing(_opened(Path(path))) as connection:
        found = connection.execute(sql)
        names = [each[0] for each in found.description]
        for number, values in enumerate(found, start=1):
            row = {name: value for name, value in zip(names, values, strict=True) if value is not None}
            if wrong := next((name for name, value in row.items() if isinstance(value, bytes)), None):
                raise sqlite3.DataError(f"row {number}: {wrong} is a BLOB: leave it out, or CAST({wrong} AS TEXT)")
            yield {column: json.dumps(row, ensure_ascii=False)}
