"""YAML text -> plain values and the place of each: safe, strict, and without YAML 1.1's traps.

`1e-4` is a number, dates and base-60 numbers are strings, duplicate keys and Python tags are errors, and an alias
cannot blow a small file up. Booleans stay as YAML 1.1 has them (yes, no, on, off), so that a bare `no` where a string
is wanted is reported rather than guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qft.disk import refusal
from qft.errors import MissingError, RecipeError
from qft.files import require_regular

MAX_BYTES = 2**20
MAX_NODES = 20_000

_TAGS = {
    yaml.MappingNode: {"tag:yaml.org,2002:map"},
    yaml.SequenceNode: {"tag:yaml.org,2002:seq"},
    yaml.ScalarNode: {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")},
}
_MERGE = "tag:yaml.org,2002:merge"
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
"""What escapes in a YAML string can make and no path or text can hold: NUL and halves of a surrogate pair."""

Place = tuple[str | int, ...]
"""Path to a value: ("train", "learning_rate"), ("data", "train", 0, "path")."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with numbers as people write them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[1] in {"bool", "null", "merge"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?([0-9][0-9_]*(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+([eE][-+]?[0-9]+)?)$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes each string that either _Loader or YAML 1.1 would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


@dataclass
class Tree:
    """Plain values, and for each place the `file:line` that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[Place, str] = field(default_factory=dict)

    def at(self, place: Place) -> str:
        """`file:line` of `place`, or of the nearest thing around it."""
        while place and place not in self.where:
            place = place[:-1]
        return self.where.get(place, "recipe")

    def merge(self, other: Tree) -> None:
        """Lay `other` over this tree: mappings merge, everything else is replaced."""
        _merge(self.values, other.values, (), self.where)
        self.where.update(other.where)


def _merge(base: dict[str, Any], over: dict[str, Any], place: Place, where: dict[Place, str]) -> None:
    for key, value in over.items():
        here = (*place, key)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, here, where)
        else:
            for old in [p for p in where if p[: len(here)] == here]:
                del where[old]
            base[key] = value


def read(path: Path, kind: str = "recipe") -> Tree:
    """Parse the file at `path`, a recipe or another `kind`. Raises MissingError, or RecipeError with the line."""
    try:
        with require_regular(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such {kind}") from None
    except OSError as error:
        raise MissingError(refusal(error, path)) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: more than {MAX_BYTES} bytes, and a {kind} has at most that many")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8") from None
    return parse(text, str(path), kind)


def parse(text: str, name: str, kind: str = "recipe") -> Tree:
    """Parse YAML `text`, of which JSON is a kind but for its tabs; `name` stands for the file in messages."""
    text = text.replace("\t", " ") if name.endswith(".json") else text
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        text = ", ".join(filter(None, [error.context, error.problem]))
        raise RecipeError(f"{name}:{line}: not valid YAML: {text}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}: not valid YAML: the character U+{error.character:04X}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply") from None
    if node is None:
        raise RecipeError(f"{name}: empty")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{name}:{node.start_mark.line + 1}: a {kind} is a mapping of names to values")
    builder = _Builder(loader, name)
    try:
        values = builder.build(node, ())
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply, or an alias that contains itself") from None
    if builder.problems:
        raise RecipeError(builder.problems)
    return Tree(values, builder.where)


def write(values: dict[str, Any]) -> str:
    """`values` as YAML that `parse` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Builder:
    """Turns nodes into values, noting the line of each and every problem on the way."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader, self.name = loader, name
        self.where: dict[Place, str] = {}
        self.problems: list[str] = []
        self.nodes = 0

    def build(self, node: yaml.Node, place: Place) -> Any:
        # Aliases make a node count at each use: a file of nested aliases stops here and not in memory.
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(f"{self.name}: more than {MAX_NODES} values once its aliases are resolved")
        self.where[place] = f"{self.name}:{node.start_mark.line + 1}"
        if not self._plain(node):
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*place, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        values = self._merged(node, place)  # first, so that the lines of the mapping's own fields overwrite theirs
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "a key must be a name")
                continue
            key, is_merge = key_node.value, key_node.tag == _MERGE
            if not is_merge and not self._plain(key_node):
                continue
            if key in seen:
                self._problem(key_node, f"{'.'.join(map(str, (*place, key)))}: given twice")
            seen.add(key)
            if not is_merge:
                values[key] = self.build(value_node, (*place, key))
                self.where[(*place, key)] = f"{self.name}:{key_node.start_mark.line + 1}"
        return values

    def _merged(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        """What `<<` brings into a mapping; of a list of mappings, the first that has a field gives it."""
        values: dict[str, Any] = {}
        here = self.where[place]
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for source in reversed(value_node.value) if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if isinstance(source, yaml.MappingNode):
                        values.update(self.build(source, place) or {})
                    else:
                        self._problem(source, "<< takes a mapping or a list of mappings")
        self.where[place] = here
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError):  # !!int x, !!bool x, !!int ''
            self._problem(node, f"cannot be read as {node.tag.rsplit(':', 1)[-1]}")
        return None

    def _plain(self, node: yaml.Node) -> bool:
        """Whether `node` is one of YAML's plain kinds of value; a problem if not."""
        if node.tag not in _TAGS[type(node)]:
            self._problem(node, f"the tag {node.tag} is not allowed; a recipe holds plain values only")
        elif isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
            self._problem(node, "holds a character that no text can hold (NUL, or half of a surrogate pair)")
        else:
            return True
        return False

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {text}")
