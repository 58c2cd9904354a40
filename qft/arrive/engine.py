"""A configuration and the tables of the tools -> a recipe that is valid, and a line for every key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qft.arrive import axolotl, llamafactory, torchtune, trl
from qft.arrive.given import is_empty, opened, require_filled_in
from qft.arrive.line import Config, Kind, Line, Rule, fields_of, number, with_value
from qft.errors import RecipeError
from qft.recipe import Recipe
from qft.recipe.rules import contradictions, unread_fields


@dataclass(frozen=True)
class Tool:
    """Another tool, as its table has it."""

    name: str
    table: Mapping[str, Rule]
    knows: Callable[[Mapping[str, Any]], bool]
    """Whether a configuration is this tool's."""
    flat: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Its values by the keys of the table."""
    defaults: Callable[[Config, Mapping[str, Any]], Iterable[Line]]
    unknown: Rule
    """What the tool makes of a key that it does not know."""
    templates: Mapping[str, str] = field(default_factory=dict)


TOOLS = {
    module.NAME: Tool(
        module.NAME, module.TABLE, module.knows, module.flat, module.defaults, module.UNKNOWN, module.TEMPLATES
    )
    for module in (torchtune, axolotl, llamafactory, trl)
}
"""By name, in the order in which they are asked whether a configuration is theirs."""
ROWS = {"torchtune": "dataset", "Axolotl": "datasets", "LLaMA-Factory": "dataset", "TRL": "dataset_name"}
"""Where each tool has its rows."""
QUOTED = ("true", "false", "True", "False")
"""What YAML reads as a text between quotes alone."""
UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What becomes of a list where a number belongs."""
NO_ROWS = (
    "names no rows to learn from ({key}); what answers, measures or merges is asked of a model by qft chat, qft eval "
    "and qft export --to merged"
)


@dataclass
class Translation:
    """What was made of a configuration."""

    tool: str
    config: Config
    lines: list[Line]
    fields: dict[str, Any]
    """Of the recipe, by dotted names."""
    templates: dict[str, str]
    """Chat templates that it needs, by name."""

    @property
    def unsupported(self) -> list[Line]:
        """What is left out."""
        return [line for line in self.lines if line.kind is Kind.UNSUPPORTED]

    @property
    def values(self) -> dict[str, Any]:
        """The recipe, as a tree."""
        return nested(self.fields)


def translate(path: Path) -> Translation:
    """Read the configuration of another tool. Raises RecipeError if it is none, MissingError without a file."""
    if path.suffix == ".sh":
        raise RecipeError(
            f"{path}: no script is run: write the options of its command as YAML, --name value as name: value"
        )
    if path.suffix in (".py", ".ipynb"):
        remedy = "write the arguments of its SFTConfig and LoraConfig as YAML, by the names that `trl sft` has for them"
        raise RecipeError(f"{path}: code is not read: {remedy} (docs/coming-from.md)")
    tree = opened(path)
    tool = _recognised(tree.values, path)
    config = Config(tree, path, tool.flat(tree.values))
    require_filled_in(config)
    lines = [with_value(line, config) for key in config.values for line in _lines(tool, key, config)]
    fields, lines = _accepted(lines)
    for line in tool.defaults(config, dict(fields)):
        if not line.sets.keys() & fields.keys():
            fields |= line.sets
            lines.append(line)
    fields.setdefault("output_dir", f"runs/{path.stem}")
    if "model.path" not in fields:
        wrong = [
            f"{config.at(line.key)}: {line.key}: {line.text}" for line in lines if line.text.startswith("model.path")
        ]
        raise RecipeError([f"{path}: {tool.name}: names no model", *wrong])
    if "data.train" not in fields and not any(line.kind is Kind.UNSUPPORTED and "data" in line.key for line in lines):
        raise RecipeError(f"{path}: {tool.name}: {NO_ROWS.format(key=ROWS[tool.name])}")
    lines = _settled(fields, lines)
    known = {**tool.templates, **{name: text for line in lines for name, text in line.templates.items()}}
    used = fields.get("data.chat_template")
    return Translation(tool.name, config, lines, fields, {n: t for n, t in known.items() if n == used})


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.seed": 1} as {"train": {"seed": 1}}, the sections in the order of a recipe."""
    values: dict[str, Any] = {}
    for name in Recipe.model_fields:
        for dotted, value in fields.items():
            section, _, inner = dotted.partition(".")
            if section == name and inner:
                values.setdefault(section, {})[inner] = value
            elif section == name:
                values[section] = value
    return values


def _recognised(values: Mapping[str, Any], path: Path) -> Tool:
    for tool in TOOLS.values():
        if tool.knows(values):
            return tool
    names = ", ".join(TOOLS)
    inner = next((f"{name}.{key}" for name, section in values.items() if isinstance(section, Mapping)
                  for key in ("base_model", "model_name_or_path") if key in section), "")  # fmt: skip
    if any(key.startswith("top.") for key in values):
        raise RecipeError(
            f"{path}: settings of LlamaBoard's page: translate the training_args.yaml of its output folder"
        )
    nested_ = f"; {inner} is there, and they read no sections: write its keys at the top" if inner else ""
    raise RecipeError(f"{path}: no configuration of {names}: it names no model as they do (base_model, "
                      f"model_name_or_path, model._component_){nested_}")  # fmt: skip


def _lines(tool: Tool, key: str, config: Config) -> Iterable[Line]:
    value, rule = config.values[key], tool.table.get(key)
    if rule is None:
        meant = difflib.get_close_matches(key, tool.table, n=1, cutoff=0.8)
        asked = f"; meant is perhaps {meant[0]}" if meant else ""
        return [replace(line, text=line.text + asked) for line in tool.unknown(key, value, config)]
    if is_empty(value):
        return [Line(key, Kind.NO_EFFECT, "empty: as if it were not there")]
    if value == "None":
        return [Line(key, Kind.UNSUPPORTED, "None is a word to YAML, and no value: write null, or remove the key")]
    if isinstance(value, str) and value in QUOTED and fields_of(rule):
        return [Line(key, Kind.UNSUPPORTED, f"a text, which is true to some whatever it says: write {value.lower()}")]
    try:
        return list(rule(key, value, config)) or [Line(key, Kind.NO_EFFECT, "empty: as if it were not there")]
    except UNFIT:
        return [Line(key, Kind.UNSUPPORTED, f"{tool.name} takes no such value: correct it")]


def _accepted(lines: Iterable[Line]) -> tuple[dict[str, Any], list[Line]]:
    """The fields that the lines set, and the lines; one whose field does not take its value is not supported."""
    fields: dict[str, Any] = {}
    kept = []
    for line in lines:
        sets, problems = {}, []
        for name, value in line.sets.items():
            taken, problem = _fitting(name, value)
            sets[name] = taken
            problems += [f"{name}: {problem}"] if problem else []
            if name in fields and fields[name] != taken:
                problems.append(f"{name} is {fields[name]!r} by another key already")
        if problems:
            kept.append(
                replace(line, kind=Kind.UNSUPPORTED, text="; ".join([*problems, line.text]).strip("; "), sets={})
            )
            continue
        fields |= sets
        kept.append(replace(line, sets=sets, kind=_named_alike(line)))
    return fields, kept


def _named_alike(line: Line) -> Kind:
    """SAME where field and key have one name."""
    names = {name.rpartition(".")[2] for name in line.sets}
    other = line.kind is Kind.SAME and names and names != {line.key.rpartition(".")[2]}
    return Kind.OTHER_FIELD if other else line.kind


def _fitting(name: str, value: Any) -> tuple[Any, str | None]:
    """The value as the field takes it, and why it does not."""
    texts = []
    read = number(value)
    whole = int(read) if isinstance(read, float) and read.is_integer() else read
    for each in (value, read, whole):
        problem = _problem(name, each)
        if problem is None:
            return each, None
        texts.append(problem)
    return value, texts[0]


def _problem(name: str, value: Any) -> str | None:
    """What the field's own validation says."""
    section, _, inner = name.partition(".")
    owner: type[BaseModel] = Recipe
    if inner:
        owner = Recipe.model_fields[section].annotation  # type: ignore[assignment]
    try:
        owner.model_validate({inner or section: value})
    except ValidationError as error:
        found = [item["msg"] for item in error.errors() if item["loc"][0] == (inner or section)]
        return " or ".join(dict.fromkeys(found)) or None
    return None


def _settled(fields: dict[str, Any], lines: list[Line]) -> list[Line]:
    """The lines, once every field is gone that contradicts another or that nothing reads beside the others."""
    told: list[Line] = []
    for _ in range(len(fields)):
        recipe = Recipe.model_validate(nested(fields))
        broken = next(((name, text, kind) for name, text, kind in _broken(recipe) if name in fields), None)
        if broken is None:
            left = [
                text for name, text, kind in _broken(recipe) if kind is Kind.UNSUPPORTED for text in [f"{name}: {text}"]
            ]
            told = [Line("(the whole)", Kind.UNSUPPORTED, text) for text in left]
            break
        name, text, kind = broken
        del fields[name]
        lines = list(_without(name, text, kind, lines))
    return [*lines, *told]


def _broken(recipe: Recipe) -> Iterator[tuple[str, str, Kind]]:
    for name, text in unread_fields(recipe).items():
        yield name, text, Kind.NO_EFFECT
    for name, text in contradictions(recipe):
        yield name, "no rows are left that qft reads: name them" if name == "data.train" else text, Kind.UNSUPPORTED


def _without(name: str, text: str, kind: Kind, lines: Iterable[Line]) -> Iterator[Line]:
    for line in lines:
        if name not in line.sets:
            yield line
        elif line.kind is not Kind.DEFAULT or kind is Kind.UNSUPPORTED:
            sets = {other: value for other, value in line.sets.items() if other != name}
            yield replace(line, sets=sets, kind=kind if not sets else line.kind, text=f"{name}: {text}")
