"""What all documents are made of, and the units of their figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Stored(Part):
    """What is written to be read again: fields that a newer qft added are kept, and those that an older one did not
    write have defaults."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)


@dataclass(frozen=True)
class Unit:
    """What a figure is counted in; `unit` of its JSON Schema."""

    name: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"unit": self.name}


Bits = Annotated[float, Unit("bits")]
Bytes = Annotated[int, Unit("bytes")]
Decibels = Annotated[float, Unit("decibels")]
Nats = Annotated[float, Unit("nats")]
Seconds = Annotated[float, Unit("seconds")]
Share = Annotated[float, Unit("share")]
"""Between 0 and 1."""
Tokens = Annotated[int, Unit("tokens")]
TokensPerSecond = Annotated[float, Unit("tokens/s")]
Versions = Annotated[dict[str, str | None], Field(description="Of what a result depends on; None: not installed.")]
DataHashes = Annotated[
    dict[str, str | None] | None,
    Field(description="SHA-256 of each source of rows by its path; None where it has no file of its own."),
]


def unit_of(field: FieldInfo) -> str | None:
    """The unit of a field, or of what it holds; None if it has none."""
    units = (each for each in (*field.metadata, *_within(field.annotation)) if isinstance(each, Unit))
    return next((unit.name for unit in units), None)


def _within(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        yield part
        yield from _within(part)
