"""What `qft check MODEL` tells of a model: what qft can do with it, and why not."""

from typing import Annotated, Literal

from pydantic import Field

from qft.documents.part import Part, Share

Reasons = Annotated[
    dict[str, str | None],
    Field(description="What can be done, by its name, with what is in its way; null: nothing is."),
]


class Held(Part):
    """One way to hold the model in few bits."""

    share: Share | None
    """Of the weights outside embeddings and head, by count, what is held so. None: it cannot be, or only other code
    knows."""
    partial: bool = False
    """Whether that is less than goes by the name without quant.allow_partial."""
    why_not: str | None = None


class Abilities(Part):
    """What is known of a model without loading a weight."""

    schema_version: Literal[1] = 1
    kind: Literal["abilities"] = "abilities"
    path: str
    model_type: str
    architecture: str
    parameters: int
    layers: int
    beside: list[str]
    """Modules beside the language part, which stay as they are."""
    quantize: dict[str, Held]
    """By quant.mode."""
    train: Reasons
    exports: Reasons
    """Of a LoRA training in the fewest bits that are possible."""
    calibrate: Reasons
    """By calibrate.engine."""
