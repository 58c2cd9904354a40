"""Kernels for the training of adapters: parts of a model computed in fewer passes over memory, as its own code would."""

from qft.kernels.attach import Applied, apply

__all__ = ["Applied", "apply"]
