"""What a model is made of, counted without its weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the model is made of, counted without its weights."""

    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    linear_parameters: int
    """Weights of the linear layers that quantization applies to (all but the output head)."""
    trainable_parameters: int
    max_positions: int | None
    """Longest sequence, in tokens, that the model was built for."""
    position_table: int | None
    """Longest sequence, in tokens, that its tables of positions have room for. None: it computes its positions."""
    embeddings: int
    """Tokens that its input embeddings know."""
    heads: tuple[str, ...]
    """Names of the output head."""
    beside: tuple[str, ...]
    """Modules beside the language part: towers for images, and what projects their output."""
