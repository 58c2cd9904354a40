"""A translation as a recipe file, which opens with the table of what became of each key."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

from qft.arrive.engine import Translation, nested
from qft.arrive.line import Kind, Line
from qft.errors import GateError, RecipeError
from qft.files import write_text
from qft.recipe import json_schema, source
from qft.recipe.starter import SCHEMA_FILE

WIDTH = 110
ORDER = (Kind.UNSUPPORTED, Kind.DEFAULT, Kind.DECIDED, Kind.OTHER_FIELD, Kind.SAME, Kind.NO_EFFECT)
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".md", ".gguf", ".jinja", ".j2")


def write_translated(path: Path, made: Translation, allow_unsupported: bool = False) -> None:
    """Write the recipe to `path`, its chat template and its JSON Schema beside it.

    Raises RecipeError if `path` exists or another chat template lies there, GateError if a key is not supported and
    that is not allowed: nothing is written then.
    """
    if path.exists():
        raise RecipeError(f"{path}: exists already, and is not overwritten")
    rows = "data.train" in made.fields
    if made.unsupported and not (allow_unsupported and rows):
        told = [f"{made.config.at(line.key)}: {line.key}: not supported: {line.text}" for line in made.unsupported]
        without = "--allow-unsupported writes the recipe without these"
        raise GateError("\n".join([*told, without if rows else "no rows are left to learn from: no recipe is written"]))
    for name, text in made.templates.items():
        beside = path.parent / name
        if beside.exists() and beside.read_text("utf-8") != text:
            raise RecipeError(f"{beside}: exists already with another text, and is not overwritten")
        write_text(beside, text)
    write_text(path.parent / SCHEMA_FILE, json.dumps(json_schema(), indent=2) + "\n")
    write_text(path, recipe_text(made, path))


def recipe_text(made: Translation, path: Path) -> str:
    """The recipe that is to lie at `path`, in whose folder its relative paths begin."""
    fields = {name: _moved(name, value, path.parent) for name, value in made.fields.items()}
    head = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Made of {made.config.path.name} ({made.tool}) by qft init --from. What became of its keys:",
    ]
    return "\n".join([*head, *_table(made.lines), "", source.write(nested(fields))])


def shown(line: Line) -> str:
    """What a line says of its key: the fields that it sets, and its text."""
    fields = ", ".join(f"{name}: {brief(value)}" for name, value in line.sets.items())
    return "; ".join(text for text in (fields, line.text) if text)


def brief(value: Any, most: int = 60) -> str:
    """A value on one line, cut to `most` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _table(lines: list[Line]) -> Iterator[str]:
    for kind in ORDER:
        of_kind = [line for line in lines if line.kind is kind]
        if of_kind:
            yield "#"
            yield f"# {kind}"
        for line in of_kind:
            value = "" if line.value is None or kind is Kind.DEFAULT else f": {brief(line.value)}"
            first = f"{line.key}{value}" + (f" -> {shown(line)}" if shown(line) else "")
            for i, part in enumerate(wrap(first, WIDTH, break_long_words=False, break_on_hyphens=False)):
                yield f"#   {'    ' if i else ''}{part}"


def _moved(name: str, value: Any, folder: Path) -> Any:
    """A path that is relative to where their tool is run, as one that is relative to the recipe's folder."""
    if name == "output_dir":
        return _relative(value, folder)
    if name in ("model.path", "data.chat_template"):
        return _if_local(value, folder)
    if name in ("data.train", "data.eval"):
        return [{**each, "path": _if_local(each["path"], folder)} for each in value]
    return value


def _if_local(path: str, folder: Path) -> str:
    local = os.path.isabs(path) or path.startswith(("./", "../", "~")) or (path.count("/") > 1 and ":" not in path)
    inside = "/" in path and path.lower().endswith(DATA_SUFFIXES)
    return _relative(path, folder) if local or inside or os.path.exists(path) else path


def _relative(path: str, folder: Path) -> str:
    wide = os.path.expanduser(path)
    if os.path.isabs(wide):
        return wide
    return os.path.relpath(os.path.abspath(wide), os.path.abspath(folder))
