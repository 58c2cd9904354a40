"""A recipe file and its overrides -> a Recipe, or every problem at once."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qft.errors import RecipeError
from qft.recipe import source
from qft.recipe.presets import PRESETS
from qft.recipe.rules import broken_rules, unread_fields
from qft.recipe.schema import Recipe
from qft.recipe.section import plain
from qft.recipe.source import Place, Tree
from qft.recipe.spread import COLUMNS, DATABASES, PACKED, SCHEME, TEXTS
from qft.recipe.stages import Stage, require_stages, with_paths
from qft.recipe.stages import schema as stage_schema

MAX_EXTENDS = 16
MAX_SHOWN = 100
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
ELSEWHERE = {
    "lora_r": "r", "lora_rank": "r", "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "lora_target": "target_modules", "load_in_4bit": "mode",
    "load_in_8bit": "mode", "bnb_4bit_quant_type": "quant_type", "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype", "max_seq_length": "max_length", "sequence_len": "max_length",
    "cutoff_len": "max_length", "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "optimizer": "optim", "warmup_ratio": "warmup_steps", "lr_scheduler": "lr_scheduler_type",
    "evaluation_strategy": "eval_strategy", "torch_dtype": "dtype", "model_name_or_path": "path", "name": "path",
    "dataset": "train", "datasets": "train", "sample_packing": "packing",
}  # fmt: skip
"""What other tools call fields of ours that are spelt otherwise."""
FILE_SUFFIXES = (".gguf", *COLUMNS, *TEXTS, *DATABASES, *PACKED)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe that still knows where each of its fields was written."""

    recipe: Recipe
    tree: Tree
    stage: Stage | None = None
    """None: it is no stage of another recipe."""

    def problem(self, field: str, text: str) -> str:
        """`file:line: section.field: text`, for a problem that only the plan can see."""
        place: Place = tuple(int(part) if part.isdecimal() else part for part in field.split("."))
        if self.stage:
            text += f" (in train.stages.{self.stage.place})"
            place = place if place in self.tree.where else ("train", "stages", self.stage.place)
        return f"{self.tree.at(place)}: {field}: {text}"

    def given(self, field: str) -> bool:
        """Whether the recipe (or its preset) sets this field, rather than leaving its default."""
        section, name = field.split(".")
        return name in self.tree.values.get(section, {})

    def has(self, section: str) -> bool:
        """Whether the recipe has this section at all."""
        return section in self.tree.values

    def having(self, **changes: Any) -> LoadedRecipe:
        """Another recipe, validated like this one. Each change is of a section: a mapping is laid over its fields, a
        section takes its place, and None takes it away.

        Rules between fields are about what somebody wrote, and not asked again."""
        tree = Tree(copy.deepcopy(self.tree.values), dict(self.tree.where))
        for name, change in changes.items():
            if change is None or isinstance(change, BaseModel):
                tree.values[name] = None  # not merged with what was there
        tree.merge(Tree(plain(changes)))
        return self.over(tree, self.stage)

    def over(self, tree: Tree, stage: Stage | None) -> LoadedRecipe:
        """The recipe of that tree. Raises RecipeError with every problem of a single field."""
        return LoadedRecipe(_validated(tree), tree, stage)


def load(path: Path, overrides: Iterable[str] = ()) -> LoadedRecipe:
    """Read `path`, what it extends and the `section.field=value` overrides, and validate the whole.

    Paths in a file are relative to that file, paths in an override to the working directory.
    Raises RecipeError with every problem found, each as `file:line: field: what to do`; MissingError without a file.
    """
    tree = _read_extended(path, ())
    for override in overrides:
        _apply_override(tree, override)
    _apply_presets(tree)
    for name, field in Recipe.model_fields.items():
        if tree.values.get(name, ...) is None and _section_class(field.annotation):
            tree.values[name] = {}  # a section whose every field is commented out
    loaded = LoadedRecipe(_validated(tree), tree)
    if loaded.recipe.train.stages:
        return require_stages(loaded)
    if problems := [loaded.problem(field, text) for field, text in broken_rules(loaded.recipe, loaded.given)]:
        raise RecipeError(sorted(problems, key=_line_order))
    return loaded


def from_values(values: dict[str, Any]) -> LoadedRecipe:
    """A recipe that no file holds; relative paths are relative to the working directory."""
    _resolve_paths(values, Path())
    tree = Tree(values)
    _apply_presets(tree)
    return LoadedRecipe(_validated(tree), tree)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors: a file that extends another may leave anything to it."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A recipe to start from; relative to this file.",
    }
    schema["$defs"]["TrainSection"]["properties"]["stages"]["items"] = stage_schema()
    for part in (schema, schema["$defs"]["ModelSection"]):
        del part["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every field that is read written out; it loads to a recipe that means the same."""
    values = recipe.model_dump(mode="json")
    for field in ["quant.preset", *(["calibrate.preset"] if recipe.calibrate else []), *unread_fields(recipe)]:
        # The presets have been applied.
        section, name = field.split(".")
        del values[section][name]
    if recipe.calibrate is None:
        del values["calibrate"]
    if recipe.quant.mode == "none":  # written out, it would contradict a checkpoint that comes quantized
        quant = values.pop("quant")
        values |= {"quant": {"allow_partial": True}} if quant["allow_partial"] else {}
    return source.write(values)


def _validated(tree: Tree) -> Recipe:
    """Raises RecipeError with every problem of a single field."""
    try:
        return Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise RecipeError(sorted(_readable(error, tree), key=_line_order)) from None


def _read_extended(path: Path, seen: tuple[Path, ...]) -> Tree:
    """`path` laid over the file that it extends, paths made absolute on the way."""
    resolved = Path(os.path.realpath(path))
    if resolved in seen or len(seen) >= MAX_EXTENDS:
        raise RecipeError(f"{path}:1: extends: a chain of recipes that never ends")
    tree = source.read(path)
    _resolve_paths(tree.values, path.parent)
    if "extends" not in tree.values:
        return tree
    parent = tree.values.pop("extends")
    if not isinstance(parent, str):
        raise RecipeError(f"{tree.at(('extends',))}: extends: the path of one recipe")
    base = _read_extended(path.parent / os.path.expanduser(parent), (*seen, resolved))
    base.merge(tree)
    return base


def _apply_override(tree: Tree, text: str) -> None:
    """Lay `train.learning_rate=2e-4` over `tree`."""
    field, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", field):
        raise RecipeError(f"--set {text}: write section.field=value")
    origin = f"--set {field}"
    try:
        parsed = source.parse(f"value: {value}", "--set")
    except RecipeError as error:
        raise RecipeError(re.sub(r"^--set:\d+", origin, problem) for problem in error.problems) from None
    if len(parsed.values) > 1:
        raise RecipeError(f"{origin}: write one value")
    keys = tuple(field.split("."))
    values = parsed.values["value"]
    for key in reversed(keys):
        values = {key: values}
    _resolve_paths(values, Path())
    tree.merge(Tree(values, {(*keys, *place[1:]): origin for place in parsed.where if place}))
    for depth in range(1, len(keys)):
        tree.where.setdefault(keys[:depth], origin)  # a section that no file has


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the local paths in `values` absolute, reading them from `folder`."""

    def local(value: Any) -> Any:
        return os.path.realpath(folder / os.path.expanduser(value)) if isinstance(value, str) and value else value

    def maybe_hub(value: Any) -> Any:
        if not isinstance(value, str) or value.startswith("package:"):
            return value
        exists = os.path.exists(folder / os.path.expanduser(value))
        # A hub id looks like a relative path: it is one only if nothing of that name lies here and it has no suffix.
        is_hub_id = HUB_ID.match(value) and not value.lower().endswith(FILE_SUFFIXES)
        return value if not exists and is_hub_id else local(value)

    def each_source(value: Any) -> Any:
        if isinstance(value, list):
            return [each_source(item) for item in value]
        if isinstance(value, dict):
            return {**value, "path": each_source(value["path"])} if "path" in value else value
        return value if isinstance(value, str) and SCHEME.match(value) else maybe_hub(value)

    def each_task(value: Any) -> Any:
        return [local(item) if is_task_file(item) else item for item in value] if isinstance(value, list) else value

    def change(section: str | None, name: str, how: Callable[[Any], Any]) -> None:
        owner = values.get(section) if section else values
        if isinstance(owner, dict) and name in owner:
            owner[name] = how(owner[name])

    change("model", "path", maybe_hub)
    change("quant", "plugin", local)
    change("train", "stages", lambda value: with_paths(value, local))
    change("data", "train", each_source)
    change("data", "eval", each_source)
    change("data", "chat_template", local)
    change("memory", "offload_folder", local)
    change("calibrate", "data", each_source)
    change("calibrate", "engine_python", lambda value: _program(value, folder))
    change("eval", "harness", each_task)
    change("export", "engine_python", lambda value: _program(value, folder))
    change("export", "registry", local)
    change("export", "converter_path", local)
    change(None, "output_dir", local)


def _program(value: Any, folder: Path) -> Any:
    """Links are left as they are: the Python of a virtual environment is one, and knows it by where it lies."""
    return os.path.abspath(folder / os.path.expanduser(value)) if isinstance(value, str) and value else value


def is_task_file(task: Any) -> bool:
    """Whether one of eval.harness is a path, rather than a name that the harness knows."""
    return isinstance(task, str) and task.lower().endswith((".yaml", ".yml"))


def _apply_presets(tree: Tree) -> None:
    """Fill in what a section's preset says and its explicit fields do not."""
    for section, presets in PRESETS.items():
        values = tree.values.get(section)
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            continue
        chosen = presets.get(values["preset"])
        if chosen and values.get("mode", chosen.get("mode")) == chosen.get("mode"):  # else rules.py refuses the preset
            for name, value in chosen.items():
                if name not in values:
                    values[name] = value
                    tree.where[section, name] = tree.at((section, "preset"))


def _readable(error: ValidationError, tree: Tree) -> list[str]:
    """pydantic's findings, one line a field."""
    found: dict[Place, list[Any]] = {}
    for item in error.errors():
        place = _known_place(item["loc"], tree)
        if item["type"] == "missing":
            place = (*place, item["loc"][-1])
        found.setdefault(place, []).append(item)
    around = {place[:depth] for place in found for depth in range(len(place))}  # their problem is what they hold
    return [
        f"{tree.at(place)}: {'.'.join(map(str, place))}: {_message(items, place)}"
        for place, items in found.items()
        if place not in around
    ]


def _known_place(loc: Place, tree: Tree) -> Place:
    """The part of pydantic's location that the recipe itself has: pydantic also names the members of a union,
    and the list that a single source stands for."""
    place: Place = ()
    for part in loc:
        if (*place, part) in tree.where:
            place = (*place, part)
    return place


def _message(items: list[Any], place: Place) -> str:
    """One text for a place, from the finding of each member of its union."""
    kind, given = items[0]["type"], items[0].get("input")
    if kind == "extra_forbidden":
        known = _siblings(place[:-1])
        meant = [name for name in [ELSEWHERE.get(str(place[-1]), "")] if name in known]
        close = meant or difflib.get_close_matches(str(place[-1]), known, n=1)
        return "unknown field" + (f", did you mean {close[0]}?" if close else "")
    if kind == "missing":
        return "this field is needed"
    shown = repr(given)
    wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
    text = f"should be {wanted}, not {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '…'}"
    if isinstance(given, bool):
        word = "true, yes or on" if given else "false, no or off"
        return f"{text} (a bare {word} is a boolean in YAML: put it in quotes if a word is meant)"
    return text


def _wanted(item: Any) -> str:
    """What one of pydantic's findings wants, to follow `should be`."""
    match item["type"]:
        case "literal_error":
            return str(item["ctx"]["expected"])
        case "string_pattern_mismatch":
            return f"a match of {item['ctx']['pattern']}"
        case "model_type":
            return "a mapping of fields"
        case "too_short" | "string_too_short":
            return "more than nothing"
        case _:
            return str(item["msg"]).removeprefix("Input should be ").replace("tuple", "list")


def _siblings(place: Place) -> list[str]:
    """Names of the fields that the section at `place` has."""
    section: type[BaseModel] = Recipe
    for part in place:
        if isinstance(part, int):
            continue
        if (inner := _section_class(section.model_fields[part].annotation)) is None:
            return []
        section = inner
    return [*section.model_fields, *([] if place else ["extends"])]


def _section_class(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's annotation names, optional or not; None for a plain value."""
    members = (annotation, *get_args(annotation))
    return next((a for a in members if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _line_order(problem: str) -> tuple[str, int]:
    match = re.match(r"(.*?):(\d+):", problem)
    return (match[1], int(match[2])) if match else (problem, 0)
