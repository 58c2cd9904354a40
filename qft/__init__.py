"""qft: finetune language models whose weights are held in few bits.

From Python and in notebooks: `qft.check("recipe.yaml")` and `qft.train("recipe.yaml")`, see qft.cli.python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qft.cli.python import check, train

__all__ = ["check", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The interface, imported once it is asked for: `import qft` alone is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    from qft.cli import python

    return getattr(python, name)
