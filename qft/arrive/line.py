"""What becomes of one key of another tool's configuration, and the rules that say so.

A tool's table maps each of its keys to a Rule. The rules here are its words; what needs more is a function beside the
table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from qft.recipe.source import Tree


class Kind(StrEnum):
    """What becomes of a key."""

    SAME = "same"
    OTHER_FIELD = "same effect by another field"
    DECIDED = "decided by qft itself"
    DEFAULT = "not set, and their tool's default differs from qft's"
    NO_EFFECT = "without effect there"
    UNSUPPORTED = "not supported"


@dataclass(frozen=True)
class Line:
    """A key, what becomes of it, and the fields of the recipe that it sets: {"train.learning_rate": 2e-4}."""

    key: str
    kind: Kind
    text: str = ""
    """What qft decides, why it has no effect there, or the remedy."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None
    """What the key has there."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates that it makes, by the names of their files."""


@dataclass(frozen=True)
class Config:
    """The configuration of another tool, and where it lies."""

    tree: Tree
    path: Path
    values: Mapping[str, Any]
    """By key; a nested one by its dotted key, where the tool's table has such."""

    def get(self, key: str, default: Any = None) -> Any:
        """What `key` has; `default` if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def at(self, key: str) -> str:
        """`file:line` of a key."""
        return self.tree.at(tuple(int(part) if part.isdecimal() else part for part in key.split(".")))

    def local(self, path: str) -> str:
        """A path as those tools read it, from where they are run: `~` made the home folder."""
        return os.path.expanduser(path)


Rule = Callable[[str, Any, Config], Iterable[Line]]
"""(key, its value, the configuration) -> its lines, of which it has one for each key within it."""


def sets(*names: str) -> Callable[[Rule], Rule]:
    """Tells `qft explain` which fields a rule is about."""

    def mark(rule: Rule) -> Rule:
        setattr(rule, "fields", names)  # noqa: B010
        return rule

    return mark


def fields_of(rule: Rule) -> tuple[str, ...]:
    """The fields that a rule is about."""
    return getattr(rule, "fields", ())


def to(name: str, convert: Callable[[Any], Any] | None = None, text: str = "") -> Rule:
    """The value, or what `convert` makes of it, is that of a field."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        kind = Kind.SAME if convert is None else Kind.OTHER_FIELD
        yield Line(key, kind, text, {name: convert(value) if convert else value})

    return sets(name)(rule)


def choose(name: str, values: Mapping[Any, Any], remedy: str) -> Rule:
    """The field's value by that of the key, and `remedy` for any other; None sets nothing."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        if not isinstance(value, str | bool | int) or value not in values:
            yield Line(key, Kind.UNSUPPORTED, remedy)
            return
        mine = values[value]
        kind = Kind.SAME if mine == value else Kind.OTHER_FIELD
        yield Line(key, kind, sets={} if mine is None else {name: mine})

    return sets(name)(rule) if any(mine is not None for mine in values.values()) else rule


def when_on(rule: Rule) -> Rule:
    """`rule` for a key that is set, and nothing for one that is off, here as there."""

    def asked(key: str, value: Any, config: Config) -> Iterable[Line]:
        off = value is False or value in ("", 0, [], {})
        return [Line(key, Kind.SAME, "off, as here")] if off else rule(key, value, config)

    return sets(*fields_of(rule))(asked)


def decided(text: str) -> Rule:
    """qft decides that itself."""
    return lambda key, value, config: [Line(key, Kind.DECIDED, text)]


def ignored(text: str) -> Rule:
    """Their tool reads no such key, or what it says changes nothing there."""
    return lambda key, value, config: [Line(key, Kind.NO_EFFECT, text)]


def refused(remedy: str) -> Rule:
    """qft has no such thing; `remedy` is what comes nearest. Off is off."""
    return when_on(lambda key, value, config: [Line(key, Kind.UNSUPPORTED, remedy)])


def many(words: Mapping[str, str], rule: Callable[[str], Rule]) -> dict[str, Rule]:
    """A rule for many keys: {text: "key key …"}."""
    return {key: rule(text) for text, keys in words.items() for key in keys.split()}


def default(name: str, value: Any, key: str) -> Line:
    """What their tool does without a key."""
    return Line(key, Kind.DEFAULT, sets={name: value})


def fastest_attention(key: str) -> Line:
    """Of an attention that is named, and not taken over by its name."""
    text = "the fastest that computes the same; model.attn_implementation: flash_attention_2, where it is installed"
    return Line(key, Kind.DECIDED, text)


def with_value(line: Line, config: Config) -> Line:
    """The line with what its key has there, be it a key within another."""
    if line.key in config.values:
        return replace(line, value=config.values[line.key])
    value: Any = config.values
    for part in line.key.split("."):
        value = _inner(value, part)
    return replace(line, value=value)


def _inner(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    items = value if isinstance(value, list) and part.isdecimal() else []
    return items[int(part)] if part.isdecimal() and int(part) < len(items) else None


def number(value: Any) -> Any:
    """A number that is written as a text, as YAML 1.1 reads 1e-4."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def strategy(value: Any) -> Any:
    """What YAML 1.1 reads of a bare `no`."""
    return "no" if value is False else value
