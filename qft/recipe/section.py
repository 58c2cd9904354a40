"""What every section of a recipe is made of."""

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, Strict
from pydantic_core import PydanticCustomError

Problem = tuple[str, str]
"""A field, and what is wrong with it."""

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Strict(False)]
"""A YAML list, held as a tuple so that a recipe stays frozen."""


def _as_pairs(value: Any) -> tuple[tuple[Any, Any], ...]:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("mapping", "Input should be a mapping of names to values")
    return tuple(value.items())


Switch = bool | int | float | str
Switches = Annotated[
    tuple[tuple[str, Switch], ...],
    BeforeValidator(_as_pairs, json_schema_input_type=dict[str, Switch]),
    PlainSerializer(dict),
]
"""A YAML mapping of names to values, held as pairs so that a recipe stays frozen."""
Renamed = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_as_pairs, json_schema_input_type=dict[str, str]),
    PlainSerializer(dict),
]
"""A YAML mapping of names to names."""
Overrides = Annotated[tuple[tuple[str, Any], ...], BeforeValidator(_as_pairs), PlainSerializer(dict)]
"""A YAML mapping of fields to values of any kind."""
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors, values are never converted, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def having(self, **changes: Any) -> Self:
        """The same section with other values, validated like the first."""
        return self.model_validate(self.model_dump(exclude_unset=True) | {n: plain(v) for n, v in changes.items()})


def plain(value: Any) -> Any:
    """Sections, wherever in `value` they are, as mappings of the fields that they set."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
