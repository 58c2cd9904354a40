"""The Scheme protocol: one way to hold the weights of linear layers in few bits."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from qft.recipe.schema import QuantSection

__all__ = ["Scheme"]


class Scheme(Protocol):
    """What qft asks of a quantization scheme."""

    def config(self, quant: QuantSection, compute_dtype: str, heads: list[str]) -> dict[str, Any]:
        """Arguments of BitsAndBytesConfig; empty if nothing is quantized. The output `heads` stay as they are."""

    def after_load(self, model: nn.Module) -> None:
        """Settle what the library leaves in a state that training would stumble on. Called after every load."""
