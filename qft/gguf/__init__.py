"""A Hugging Face folder of 16-bit or 32-bit weights, written as one GGUF file."""

from qft.gguf.write import KINDS, write_gguf

__all__ = ["KINDS", "write_gguf"]
