"""Ways to quantize a trained model, one file each; an engine and its library are imported only when asked for."""

from importlib import import_module

from qft.quant.engines.base import Block, Engine, QuantizedLayer, linear_of

__all__ = ["ENGINES", "Block", "Engine", "QuantizedLayer", "find_engine", "linear_of"]


ENGINES = {"autoround": "AutoRound", "rtn": "RoundToNearest", "bitsandbytes": "BitsAndBytes", "torchao": "TorchAo"}
"""Classes of those that take single blocks, by calibrate.engine, after which their files are called."""


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises ImportError without its packages."""
    engine: Engine = getattr(import_module(f"{__name__}.{name}"), ENGINES[name])()
    return engine
