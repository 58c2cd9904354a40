"""A field of the recipe, for people: what it means, what it takes, who reads it, and what other tools call it."""

import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from qft.arrive.engine import TOOLS
from qft.arrive.line import fields_of
from qft.errors import RecipeError
from qft.recipe import Recipe, json_schema

READERS = {
    "model": "transformers, from_pretrained",
    "quant": "qft, transformers.BitsAndBytesConfig",
    "adapter": "peft.LoraConfig",
    "train": "transformers.TrainingArguments",
}
"""Section -> the library that is told; without an entry qft reads it itself."""
OWN = {
    "adapter": {"kind", "target_experts", "target_towers"},
    "train": {
        "early_stopping_patience", "on_nonfinite", "gradient_checkpointing", "report_to", "bf16", "tf32",
        "save_on_signal", "chunked_loss", "stages", "kernels", "matmul", "router_aux_loss_coef",
    },
}  # fmt: skip
"""Fields of those sections that qft reads itself, or hands over in another form."""
SOURCES = {"data.train", "data.eval", "calibrate.data"}
"""Lists of mappings, of whose fields --set sets none by itself."""


@dataclass(frozen=True)
class Explained:
    """What there is to say of one field."""

    field: str
    meaning: str
    takes: str
    default: str
    reader: str
    peers: dict[str, tuple[str, ...]]
    """Tool -> its keys."""
    inner: tuple[str, ...] = ()
    """Fields of a section."""


_schema = functools.cache(json_schema)


def field_names() -> dict[str, Any]:
    """Dotted names of all fields, those of a source too (`data.train.split`) -> their JSON Schemas."""
    schema = _schema()
    return {name: part for field, part in schema["properties"].items() for name, part in _within(field, part, schema)}


def _within(name: str, part: Any, schema: Any) -> Iterator[tuple[str, Any]]:
    """A field and those in it, each with its schema."""
    yield name, part
    for field, inner in _referred(part, schema).get("properties", {}).items() if name != "extends" else ():
        yield from _within(f"{name}.{field}", inner, schema)


def explain(field: str) -> Explained:
    """Raises RecipeError for what is no field, with what may be meant."""
    known = field_names()
    if field not in known:
        names = [name for name in known if name.rpartition(".")[2] == field.lower()] or _by_peer(field)
        names = names or difflib.get_close_matches(field.lower(), known, n=3, cutoff=0.6)
        meant = f"; meant is perhaps {' or '.join(names)}" if names else ""
        raise RecipeError(f"{field}: the recipe has no such field{meant}")
    schema, section = _schema(), field.partition(".")[0]
    part = known[field]
    own = field.rpartition(".")[2] in OWN.get(section, ())
    return Explained(
        field=field,
        meaning=" ".join((part.get("description") or _referred(part, schema).get("description", "")).split()),
        takes=" or ".join(_takes(part, schema)),
        default=_default(field),
        reader="qft" if own or section not in READERS else READERS[section],
        peers={tool.name: keys for tool in TOOLS.values() if (keys := _keys(tool.table, field))},
        inner=tuple(name for name in known if name.rpartition(".")[0] == field),
    )


def completed(incomplete: str) -> Iterator[str]:
    """Fields that `incomplete` begins, and once there is a `=` the values of one that has few. A section is completed
    before its fields."""
    field, equals, begun = incomplete.partition("=")
    known = [name for name in field_names() if name != "extends"]
    if equals and field in known:
        words = explain(field).takes.replace(" or ", ", ").split(", ")
        yield from (f"{field}={word}" for word in words if " " not in word and word.startswith(begun))
        return
    sections = {name.rpartition(".")[0] for name in known} - SOURCES
    for name in known:
        if name.startswith(field) and name.count(".") == field.count(".") and name.rpartition(".")[0] not in SOURCES:
            yield f"{name}." if name in sections else name


def _keys(table: Any, field: str) -> tuple[str, ...]:
    return tuple(key for key, rule in table.items() if field in fields_of(rule))


def _by_peer(key: str) -> list[str]:
    """Fields that another tool calls so."""
    return sorted({name for tool in TOOLS.values() if key in tool.table for name in fields_of(tool.table[key])})


def _referred(part: Any, schema: Any) -> Any:
    """What a schema refers to, or itself."""
    found = part.get("$ref") or next((each["$ref"] for each in part.get("anyOf", ()) if "$ref" in each), None)
    return schema["$defs"][found.rpartition("/")[2]] if found else part


def _takes(part: Any, schema: Any) -> list[str]:
    """The kinds of values of a schema."""
    if "anyOf" in part:
        return list(dict.fromkeys(text for each in part["anyOf"] for text in _takes(each, schema)))
    if "$ref" in part:
        return ["a mapping"]
    if "enum" in part or "const" in part:
        return [", ".join(map(_word, part.get("enum", [part.get("const")])))]
    if part.get("type") == "array":
        return [f"a list of {' or '.join(_takes(part['items'], schema)) if part.get('items') else 'values'}"]
    kind = {
        "integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false",
        "null": "null", "object": "a mapping",
    }.get(part.get("type", ""), "any value")  # fmt: skip
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return [" ".join([kind, *(f"{word} {part[name]}" for name, word in limits.items() if name in part)])]


def _default(field: str) -> str:
    *sections, name = field.split(".")
    owner: Any = Recipe
    for section in sections:
        owner = _model(owner.model_fields[section].annotation)
    found = owner.model_fields.get(name)
    if found is None or found.is_required():
        return "none: it has to be given" if found else ""
    value = found.get_default(call_default_factory=True)
    return "the defaults of its fields" if isinstance(value, BaseModel) else _word(value)


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that a field takes, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model(each))), None)


def _word(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else "[]" if value == () else str(value)
