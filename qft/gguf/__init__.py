"""A Hugging Face folder of 16-bit or 32-bit weights, written as one GGUF file."""

from qft.gguf.write import KINDS, require_writable, write_gguf

__all__ = ["KINDS", "require_writable", "write_gguf"]
