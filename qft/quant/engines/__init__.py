"""Ways to quantize a trained model, one file each; an engine and its library are imported only when asked for."""

from __future__ import annotations

from importlib import import_module

from qft.quant.engines.base import Block, Engine, Held, LayerScheme

__all__ = ["ENGINES", "Block", "Engine", "Held", "LayerScheme", "find_engine"]

ENGINES: dict[str, tuple[str, str]] = {
    "autoround": ("qft.quant.engines.autoround", "AutoRound"),
    "rtn": ("qft.quant.engines.rtn", "RoundToNearest"),
    "bitsandbytes": ("qft.quant.engines.bitsandbytes", "BitsAndBytes"),
    "torchao": ("qft.quant.engines.torchao", "TorchAo"),
}
"""By calibrate.engine: module and class."""


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises ImportError without its packages."""
    module, kind = ENGINES[name]
    engine: Engine = getattr(import_module(module), kind)()
    return engine
