"""How people come from another tool: its configuration, translated into a recipe with every key accounted for."""

from qft.arrive.engine import TOOLS, Translation, translate
from qft.arrive.line import Kind, Line

__all__ = ["TOOLS", "Kind", "Line", "Translation", "translate"]
