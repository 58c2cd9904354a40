"""A configuration as it is given: read, and refused as a whole where parts of it are still to be filled in."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qft.arrive.line import Config
from qft.errors import RecipeError
from qft.recipe import source

UNFILLED = re.compile(r"\$\{\{?[^{}]*\}?\}|^\s*\{\{[^{}]*\}\}\s*$|(^|(?<=/))\$[A-Z_]+(?=/|$)")
"""${NAME} and $NAME in a path, and a value that is {{ name }} alone."""
TEXT = re.compile("template|format|prompt")
"""In the names of keys whose values have places of their own."""
MARKS = re.compile(r"\{\{.*\}\}|\{%.*%\}")
"""Of a template that makes configurations; one for chats has messages, and may stand in one."""


def opened(path: Path) -> source.Tree:
    """The configuration at `path`. Raises RecipeError, MissingError."""
    try:
        return source.read(path, "configuration")
    except RecipeError as error:
        try:
            text = path.read_text("utf-8")
            marked = None if "message" in text else MARKS.search(text)
        except (OSError, ValueError):
            marked = None
        if "given twice" in str(error):
            told = "Axolotl and TRL read the last of them, and LLaMA-Factory and torchtune refuse it: keep one"
            raise RecipeError([*error.problems, told]) from None
        if not marked:
            raise
        text = f"{error}\n{path}: {marked[0]} is of a template: fill it in first, and translate what it makes"
        raise RecipeError(text) from None


def require_filled_in(config: Config) -> None:
    """Raise RecipeError, of all places at once, where a value is one that somebody was to put in."""
    found = [
        f"{config.at(key)}: {key}: {place} is still to be filled in"
        for key, value in config.values.items()
        for place in _places(value)
        if not TEXT.search(key)
    ]
    if found:
        raise RecipeError(
            [
                *dict.fromkeys(found),
                "fill them in first (envsubst < template.yaml > filled.yaml), or set what they name",
            ]
        )


def _places(value: Any) -> Iterator[str]:
    if isinstance(value, str) and (found := UNFILLED.search(value)):
        yield found[0].strip()
    inner = [each for key, each in value.items() if not TEXT.search(str(key))] if isinstance(value, Mapping) else value
    for each in inner if isinstance(inner, list) else ():
        yield from _places(each)


def is_empty(value: Any) -> bool:
    """Whether nothing is said: null, an empty text, or a mapping of such."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(is_empty, value.values()))
    return value is None or value == ""
