"""Kernels for the training of adapters: parts of a model in fewer passes over memory than its own code takes."""

from qft.kernels.attach import FLOAT8, LINEAR, MLP, NORM, ROTARY, Applied, apply, expect
from qft.kernels.float8 import Dither
from qft.kernels.keep import Keep, keep

__all__ = ["FLOAT8", "LINEAR", "MLP", "NORM", "ROTARY", "Applied", "Dither", "Keep", "apply", "expect", "keep"]
