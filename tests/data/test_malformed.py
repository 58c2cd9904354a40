"""A corpus of files that are no sound rows, made here: `qft check` tells of each in one located message."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from qft.data.prepare import SHOWN
from qft.errors import DataError, MissingError
from tests.support.cli import qft
from tests.support.rows import chat

RecipeFile = Callable[..., Path]
TOOL = {"type": "function", "function": {"name": "f"}}
GOOD = json.dumps(chat("ask", "it is"))


def turns(*turns: Any, **beside: Any) -> str:
    return json.dumps({"messages": [*turns], **beside})


def user(content: Any = "ask", **beside: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **beside}


def said(content: Any = "it is", **beside: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **beside}


LINES: dict[str, tuple[str, str]] = {
    "an object that is cut": (GOOD[:40], "not valid JSON"),
    "a text that is cut": (GOOD[:-9], "not valid JSON"),
    "an empty array": ("[]", "not list"),
    "an array of rows": (f"[{GOOD}]", "not list"),
    "a text": ('"hello"', "not str"),
    "a number": ("17", "not int"),
    "null": ("null", "not NoneType"),
    "NaN": ("NaN", "not float"),
    "two objects": (GOOD + GOOD, "Extra data at column"),
    "a comma behind it": (GOOD + ",", "Extra data at column"),
    "single quotes": ("{'messages': []}", "column 2"),
    "no JSON at all": ("hello there", "column 1"),
    "a comment": ("// rows", "column 1"),
    "a key that is given twice": ('{"messages": [], "messages": []}', "messages: given twice"),
    "a role that is given twice": (turns(user(), said()).replace('"role"', '"role": "user", "role"'), "role: given"),
    "a weight that is none": (turns(user(), said(weight=float("nan"))), r"messages\.1\.weight: .* not nan"),
    "NaN in a tool": (turns(user(), said(), tools=[TOOL | {"n": float("nan")}]), r"tools\.0\.n: nan is no JSON number"),
    "a number beyond floats": (
        turns(user(), said(), tools=[TOOL | {"n": 7}]).replace("7", "-1e999"),
        r"tools\.0\.n: -inf is no JSON number",
    ),
    "a number of many digits": ('{"messages": ' + "1" * 10_000 + "}", "digits"),
    "arrays nested deeply": ('{"messages": ' + "[" * 100_000, "nested too deeply"),
    "objects nested deeply": ('{"a":' * 100_000, "nested too deeply"),
    "tools nested deeply": (turns(user(), said(), tools=[7]).replace("7", '{"a":' * 900 + "1" + "}" * 900), "deeply"),
    "half a surrogate pair": (turns(user("\ud83c"), said()), r"\\ud83c is half a character"),
    "half a pair in a key": (turns(user(), said(), **{"\udc00": 1}), r"\\udc00 is half a character"),
    "NUL bytes": ("\0" * 50, "column 1"),
    "a NUL byte within": (GOOD.replace("ask", "a\0sk"), "control character"),
    "a tab within": (GOOD.replace("ask", "a\tsk"), "control character"),
    "a bad escape": (GOOD.replace("ask", r"\x41"), r"escape"),
    "a byte order mark within": ("\ufeff" + GOOD, "column 1|BOM"),
    "no fields": ("{}", "messages"),
    "unknown fields": ('{"q": "ask", "a": "it is"}', "messages"),
    "another format": ('{"prompt": "ask", "completion": "it is"}', "messages"),
    "plain text": ('{"text": "all of it"}', "messages"),
    "another case": ('{"Messages": []}', "messages"),
    "messages: null": ('{"messages": null}', "messages: needs a list of turns"),
    "messages: a text": ('{"messages": "ask"}', "messages: needs a list of turns"),
    "messages: a number": ('{"messages": 7}', "messages: needs a list of turns"),
    "messages: an object": ('{"messages": {"role": "user"}}', "messages: needs a list of turns"),
    "messages: none": ('{"messages": []}', "messages: "),
    "messages: JSON that is cut": ('{"messages": "[{"}', "messages: not valid JSON"),
    "messages: texts": (turns("ask", "it is"), r"messages\.0: needs role and content, not str"),
    "messages: lists": (turns(["user", "ask"]), r"messages\.0: needs role and content, not list"),
    "messages: null within": (turns(None, said()), r"messages\.0: needs role and content, not NoneType"),
    "no role": (turns({"content": "ask"}, said()), r"messages\.0\.role: None is none of"),
    "a role in capitals": (turns({"role": "User", "content": "ask"}, said()), r"messages\.0\.role: 'User' is none"),
    "an unknown role": (turns({"role": "bot", "content": "ask"}, said()), r"messages\.0\.role: 'bot' is none of"),
    "a role that is a number": (turns({"role": 1, "content": "ask"}, said()), r"messages\.0\.role: 1 is none of"),
    "a role that is a list": (turns({"role": ["user"], "content": ""}, said()), r"messages\.0\.role: \['user'\]"),
    "no content": (turns({"role": "user"}, said()), r"messages\.0\.content: needs a text"),
    "content: null": (turns(user(None), said()), r"messages\.0\.content: needs a text"),
    "content: a number": (turns(user(7), said()), r"messages\.0\.content: needs a text"),
    "content: an object": (turns(user({"text": "ask"}), said()), r"messages\.0\.content: needs a text"),
    "content: a list of texts": (turns(user(["ask"]), said()), r"messages\.0\.content\.0: only parts"),
    "content: a part without text": (turns(user([{"type": "text"}]), said()), r"messages\.0\.content\.0: only parts"),
    "content: sound": (turns(user([{"type": "audio", "audio": "x"}]), said()), r"messages\.0\.content\.0: only parts"),
    "content: no parts": (turns(user(), said([])), r"messages\.1\.content: the assistant says nothing"),
    "an answer of nothing": (turns(user(), said("")), r"messages\.1\.content: the assistant says nothing"),
    "an answer of white space": (turns(user(), said(" \n")), r"messages\.1\.content: the assistant says nothing"),
    "no answer": (turns(user()), "does not end with the assistant"),
    "the answer first": (turns(said(), user(), said()), r"messages\.0: a conversation cannot start"),
    "nothing but an answer": (turns(said()), r"messages\.0: a conversation cannot start"),
    "a weight of two": (turns(user(), said(weight=2)), r"messages\.1\.weight: is a number"),
    "a weight that is a list": (turns(user(), said(weight=[])), r"messages\.1\.weight: is a number"),
    "no turn that is learnt": (turns(user(), said(weight=0)), "no turn is learnt"),
    "calls: a text": (turns(user(), said(tool_calls="f()")), r"messages\.1\.tool_calls: needs a list of calls"),
    "calls: texts": (turns(user(), said(tool_calls=["f"])), r"messages\.1\.tool_calls: needs a list of calls"),
    "arguments that are cut": (
        turns(user(), said(tool_calls=[{"function": {"name": "f", "arguments": '{"a"'}}])),
        r"messages\.1\.tool_calls\.0\.function\.arguments: not valid JSON",
    ),
    "arguments: a list": (
        turns(user(), said(tool_calls=[{"name": "f", "arguments": "[1]"}])),
        r"messages\.1\.tool_calls\.0\.arguments: needs a JSON object",
    ),
    "half a character in JSON text": (
        json.dumps({"messages": '[{"role": "user", "content": "\\ud83c"}]'}),
        r"messages: not valid text: \\ud83c is half a character",
    ),
    "half a character in arguments": (
        turns(user(), said("", tool_calls=[{"name": "f", "arguments": '{"a": "\\udc00"}'}])),
        r"messages\.1\.tool_calls\.0\.arguments: not valid text: \\udc00 is half a character",
    ),
    "tools: a text": (turns(user(), said(), tools="search"), "tools: needs a list of JSON schemas"),
    "tools: numbers": (turns(user(), said(), tools=[1]), "tools: needs a list of JSON schemas"),
    "history: texts": (turns(user(), said(), history=["a", "b"]), "history: needs a list of pairs"),
    "system: a list": (turns(user(), said(), system=["be brief"]), "system: needs a text, not list"),
    "two systems": (turns({"role": "system", "content": "a"}, user(), said(), system="b"), "system: the turns begin"),
    "template arguments: a list": (turns(user(), said(), chat_template_kwargs=[1]), "chat_template_kwargs: needs"),
    "a row of megabytes": (turns(user("a " * 200_000), said()), "tokens, and data.max_length is 128"),
}
"""Of a file whose other rows are sound."""


def table(**columns: Any) -> bytes:
    """A parquet file."""
    pq.write_table(pa.table(columns), made := pa.BufferOutputStream())
    return bytes(made.getvalue())


ROWS = f"{GOOD}\n".encode() * 3
CSV = b"prompt,completion\na,b\n"
FILES: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("rows.jsonl", b"", ": the file is empty"),
    "a byte order mark": ("rows.jsonl", codecs.BOM_UTF8, ": the file is empty"),
    "blank lines": ("rows.jsonl", b"\n\n \n", ":1: blank"),
    "spaces": ("rows.json", b"   ", ":1: blank"),
    "UTF-16": ("rows.jsonl", ROWS.decode().encode("utf-16"), ":1: not UTF-8 text but UTF-16"),
    "UTF-16, big": (
        "rows.csv",
        codecs.BOM_UTF16_BE + CSV.decode().encode("utf-16-be"),
        ":1: not UTF-8 text but UTF-16",
    ),
    "UTF-16 without a mark": ("rows.jsonl", ROWS.decode().encode("utf-16-le"), ":1: not valid JSON"),
    "UTF-32": ("rows.json", ROWS.decode().encode("utf-32"), ":1: not UTF-8 text but UTF-32"),
    "Latin-1": (
        "rows.jsonl",
        ROWS + '{"text": "\xe9"}'.encode("latin-1"),
        ":4: not UTF-8 text: byte 0xe9 at column 11",
    ),
    "half a character": ("rows.jsonl", ROWS + '{"text": "\xe9'.encode()[:-1], ":4: not UTF-8 text: byte 0xc3"),
    "half a character in an array": ("rows.json", b"[1,\n\xc3]", ":2: not UTF-8 text: byte 0xc3 at column 1"),
    "half a character in a table": ("rows.csv", CSV + b"\xc3,b\n", ":3: not UTF-8 text: byte 0xc3 at column 1"),
    "half a character in a text": ("rows.txt", b"a\r\nb\xff", ":2: not UTF-8 text: byte 0xff at column 2"),
    "line ends of a Mac": ("rows.jsonl", ROWS.replace(b"\n", b"\r") + b"{", ""),
    "mixed line ends": ("rows.jsonl", f"{GOOD}\r\n{GOOD}\n{GOOD[:-3]}\r\n".encode(), ":3: not valid JSON"),
    "NUL bytes alone": ("rows.jsonl", bytes(100), ":1: not valid JSON"),
    "a hole": ("rows.jsonl", ROWS + bytes(5000), ":4: not valid JSON"),
    "JSON over several lines": ("rows.jsonl", json.dumps(json.loads(GOOD), indent=1).encode(), ":1: not valid JSON"),
    "an object in a .json": ("rows.json", b'{"data": [1]}', ":1: fields data fit no known format"),
    "an array that is cut": ("rows.json", b"[" + GOOD.encode() + b",\n", ":2: not valid JSON"),
    "an array in a .jsonl": ("rows.jsonl", f"[{GOOD},\n".encode(), ":1: not valid JSON"),
    "an array with a comma more": ("rows.json", f"[{GOOD},\n]".encode(), ":2: not valid JSON"),
    "something behind an array": ("rows.json", f"[{GOOD}]\n]".encode(), ":2: not valid JSON: Extra data"),
    "an array of nothing": ("rows.json", b"[]", ": holds no row"),
    "an array of arrays": ("rows.json", b"[[]]", ": row 1: a row is a JSON object, not list"),
    "an array nested deeply": ("rows.json", b"[" * 100_000, ": not valid JSON: nested too deeply"),
    "a header alone": ("rows.csv", b"prompt,completion\n", ": no row below the header"),
    "a header that says a name twice": ("rows.csv", b"a,a\n1,2\n", ": two columns"),
    "a row of more cells": ("rows.csv", CSV + b"a,b,c\n", ":3: 3 cells, and the header has 2"),
    "a first row of more cells": ("rows.csv", b"prompt,completion\n\na,b,c\n", ":3: 3 cells, and the header has 2"),
    "a row of fewer cells": ("rows.csv", CSV + b'"a\n",b\na\n', ":5: 1 cells, and the header has 2"),
    "a quote that is not closed": ("rows.csv", CSV + b'a,"b\nc,d\n', ":3: a quote is not closed"),
    "spaces in the header": ("rows.csv", b"prompt, completion\na, b\n", ": row 1: fields prompt, ' completion' fit"),
    "a row of many lines": (
        "rows.jsonl",
        json.dumps(chat("a", "b"), indent=1).encode(),
        ":1: not valid JSON: .*JSON lines have one row a line",
    ),
    "semicolons": ("rows.csv", b"prompt;completion\na;b\n", ": row 1: fields prompt;completion fit no known format"),
    "an empty cell": ("rows.csv", CSV + b"a,\n", ": row 2: completion: "),
    "NUL bytes in a table": ("rows.csv", bytes(50), ""),
    "a parquet file that is none": ("rows.parquet", ROWS, ": cannot be read: .*Parquet magic bytes"),
    "a parquet file that is cut": ("rows.parquet", table(text=["a"])[:-20], ": cannot be read: "),
    "a parquet file that begins late": ("rows.parquet", table(text=["a"])[20:], ": cannot be read: "),
    "a parquet file with a hole": ("rows.parquet", table(text=["a"])[:4] + bytes(40) + table(text=["a"])[44:], ""),
    "a parquet file of no rows": ("rows.parquet", table(text=pa.array([], pa.string())), ": holds no row"),
    "a parquet file of no columns": ("rows.parquet", table(), ""),
    "a parquet file of bytes that are no UTF-8": (
        "rows.parquet",
        table(a=["é", "a"], text=pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())),
        ": row 2: text: not UTF-8 text",
    ),
    "such bytes in a message": (
        "rows.parquet",
        table(
            messages=pa.ListArray.from_arrays(
                [0, 1], pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
            )
        ),
        ": row 1: messages: not UTF-8 text",
    ),
    "a time that no calendar has": (
        "rows.parquet",
        table(text=["a"], at=pa.array([10**14], pa.timestamp("s"))),
        ": row 1: at: a time that no calendar has",
    ),
    "a packed file of nothing": ("rows.jsonl.gz", gzip.compress(b""), ": holds no row"),
    "a database that is none": ("rows.db", ROWS, ": file is not a database"),
    "nulls": ("rows.parquet", table(text=pa.array([None], pa.string())), ": row 1: fields .none. fit no known format"),
    "numbers for texts": ("rows.parquet", table(text=[1]), ": row 1: text: needs a text, not int"),
    "bytes for texts": ("rows.parquet", table(text=[b"a"]), ": row 1: text: needs a text, not bytes"),
    "texts for messages": ("rows.parquet", table(messages=["ask"]), ": row 1: messages: needs a list of turns"),
    "numbers for messages": ("rows.parquet", table(messages=[[1]]), r": row 1: messages\.0: needs role and content"),
    "an hour in a message": (
        "rows.parquet",
        table(messages=[[user(at=datetime(2026, 1, 1)), said()]]),
        r": row 1: messages\.0\.at: the chat template does not print it",
    ),
    "NaN in a message": (
        "rows.parquet",
        table(messages=[[user(at=float("nan")), said()]]),
        r": row 1: messages\.0\.at: nan is no JSON number",
    ),
    "bytes in a message": (
        "rows.parquet",
        table(messages=[[user(at=b"\xff"), said()]]),
        r": row 1: messages\.0\.at: needs a text or a number, not bytes",
    ),
    "a gzip file that is cut": ("rows.jsonl.gz", gzip.compress(ROWS)[:-9], ": "),
    "a gzip file under another name": ("rows.jsonl", gzip.compress(ROWS)[:-9], ": cannot be read: "),
    "an xz file that is cut": ("rows.jsonl", lzma.compress(ROWS)[:-9], ": cannot be read: "),
    "a bzip2 file with a hole": ("rows.jsonl", bz2.compress(ROWS)[:20] + bytes(99), ": cannot be read: "),
    "a gzip file with a hole": ("rows.jsonl", gzip.compress(ROWS)[:20] + bytes(99), ": cannot be read: "),
    "a gzip file of Latin-1": ("rows.jsonl", gzip.compress(b"\xe9"), ": not UTF-8 text"),
    "a number of many digits in an array": ("rows.json", f"[{'1' * 9999}, {GOOD}]".encode(), ": row 1: not valid JSON"),
    "a zip file under another name": ("rows.csv", b"PK\x03\x04\x14\0\0\0\x08\0\xb7", ":1: not UTF-8 text"),
    "a file of another kind": ("rows.xlsx", ROWS, ": cannot tell what it holds"),
    "a file of no kind": ("rows", ROWS, ": cannot tell what it holds"),
    "a text of nothing": ("rows.txt", b"\n \n", ":1: blank"),
}


def check(recipe_file: RecipeFile, path: Path) -> Result:
    return qft("check", recipe_file(quant=None, adapter={"kind": "none", "r": ...}, data={"train": str(path)}))


def test_each_bad_line_is_told_by_its_place_and_what_is_wrong(recipe_file: RecipeFile, tmp_path: Path) -> None:
    wrong, path = list[str](), tmp_path / "rows.jsonl"
    lines = iter(LINES.items())
    while some := [*islice(lines, SHOWN)]:
        path.write_text("\n".join([GOOD, *(line for _, (line, _) in some), GOOD, ""]))
        result = check(recipe_file, path)
        told = result.stderr.removeprefix("error: ").splitlines()
        assert result.exit_code == DataError.exit_code, result.stderr
        assert len(told) == len(some) + 1, result.stderr
        for number, (each, (name, (_, reason))) in enumerate(zip(told, some, strict=False), start=2):
            if not each.startswith(f"{path}:{number}: ") or not re.search(reason, each) or len(each) > 500:
                wrong.append(f"{name}: {each[:500]}")
    assert not wrong, "\n".join(wrong)


def test_each_bad_file_is_told_in_one_line(recipe_file: RecipeFile, tmp_path: Path) -> None:
    wrong = []
    for name, (file, content, reason) in FILES.items():
        path = tmp_path / file
        path.write_bytes(content)
        result = check(recipe_file, path)
        told = result.stderr.removeprefix("error: ").splitlines()
        is_one = len(told) == 1 or (len(told) == 2 and "rows cannot be used" in told[1])
        if (
            result.exit_code != DataError.exit_code
            or not is_one
            or not re.match(re.escape(str(path)) + reason, told[0])
        ):
            wrong.append(f"{name}: {result.exit_code}: {result.stderr[:500]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "model.safetensors"])
def test_what_git_lfs_has_left_is_told(file: str, tiny_model: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    changes = {} if file.startswith("model") else {"data": {"train": str(tmp_path / file)}}
    result = qft("check", recipe_file(model={"path": str(tmp_path)}, **changes))
    assert result.exit_code == MissingError.exit_code
    assert f"{file}: is a pointer of Git LFS, and not the file itself: run `git lfs pull` there" in result.stderr


def test_what_is_no_file_is_missing(recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, what in {"folder": " (it is a folder)", "loop": "", "pipe": " (it is a pipe)", "absent": ""}.items():
        path = tmp_path / f"{name}.jsonl"
        result = check(recipe_file, path)
        assert result.exit_code == MissingError.exit_code
        assert result.stderr == f"error: {path}: no such data file{what}\n"
