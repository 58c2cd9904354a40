"""The commands, one file each, and what they share. Everything heavy is imported inside them."""

from qft.cli.app import app, main

__all__ = ["app", "main"]
