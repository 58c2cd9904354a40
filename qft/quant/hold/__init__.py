"""Ways to hold weights in few bits, one file each."""

from qft.quant.hold.base import Scheme
from qft.quant.hold.bnb_4bit import Bnb4Bit
from qft.quant.hold.bnb_8bit import Bnb8Bit
from qft.quant.hold.none import Unquantized

__all__ = ["SCHEMES", "Scheme"]

SCHEMES: dict[str, Scheme] = {"none": Unquantized(), "8bit": Bnb8Bit(), "4bit": Bnb4Bit()}
"""By quant.mode."""
