"""Versions of exported models in a local folder: immutable, numbered, one of them current, and the way back."""

from qft.registry.compare import diff
from qft.registry.facts import facts_of
from qft.registry.shelf import ORIGINAL, Shelf, find_shelf, names
from qft.registry.verify import Which, damages, inspect, problems
from qft.registry.write import add, promote, require_usable, rollback

__all__ = ["ORIGINAL", "Shelf", "Which", "add", "damages", "diff", "facts_of", "find_shelf", "inspect", "names"]
__all__ += ["problems", "promote", "require_usable", "rollback"]
