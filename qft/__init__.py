"""qft: finetune language models whose weights are held in few bits."""

__version__ = "0.1.0"
