"""Ways to quantize a trained model, one file each; an engine and its library are imported only when asked for."""

from collections.abc import Callable

from qft.quant.engines.base import Block, Engine, QuantizedLayer, linear_of

__all__ = ["ENGINES", "Block", "Engine", "QuantizedLayer", "find_engine", "linear_of"]


def _autoround() -> Engine:
    from qft.quant.engines.autoround import AutoRound

    return AutoRound()


def _rtn() -> Engine:
    from qft.quant.engines.rtn import RoundToNearest

    return RoundToNearest()


def _bitsandbytes() -> Engine:
    from qft.quant.engines.bitsandbytes import BitsAndBytes

    return BitsAndBytes()


def _torchao() -> Engine:
    from qft.quant.engines.torchao import TorchAo

    return TorchAo()


Makers = dict[str, Callable[[], Engine]]
ENGINES: Makers = {"autoround": _autoround, "rtn": _rtn, "bitsandbytes": _bitsandbytes, "torchao": _torchao}
"""Those that take single blocks, by calibrate.engine."""


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises ImportError without its packages."""
    return ENGINES[name]()
