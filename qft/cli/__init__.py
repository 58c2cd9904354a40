"""The commands, and what they share. Everything heavy is imported inside them."""

from qft.cli.app import app, main

__all__ = ["app", "main"]
