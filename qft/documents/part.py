"""What all documents are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Part", "Stored"]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Stored(Part):
    """What is written to be read again: fields that a newer qft added are kept, and those that an older one did not
    write have defaults."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)
