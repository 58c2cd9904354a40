"""A Hugging Face folder of 16-bit or 32-bit weights, written as one GGUF file, and its weights read back."""

from qft.gguf.read import read_gguf
from qft.gguf.write import KINDS, require_writable, write_gguf

__all__ = ["KINDS", "read_gguf", "require_writable", "write_gguf"]
