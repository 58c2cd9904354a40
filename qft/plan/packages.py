"""What evaluations and engines need beyond qft's own dependencies."""

import importlib.util
from collections.abc import Collection, Iterable, Iterator

from qft.recipe.catalogue import CATALOGUE

PACKAGES = {
    "f1_macro": ("sklearn", "scikit-learn"),
    "f1_micro": ("sklearn", "scikit-learn"),
    "rouge_l": ("rouge_score", "rouge-score"),
}
"""What a score needs: name of the module, name of the package."""


def missing_packages(metrics: Iterable[str] = (), harness: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (field, what to install) for each score whose package is not there, and for tasks of the harness; imports
    nothing."""
    for name in metrics:
        module, package = PACKAGES.get(name, (None, None))
        if module and importlib.util.find_spec(module) is None:
            yield "eval.metrics", f"{name} needs {package}; pip install 'qft[eval]'"
    if harness and importlib.util.find_spec("lm_eval") is None:
        yield "eval.harness", "needs lm-eval; pip install 'qft[eval]'"


def missing_engine(name: str) -> Iterator[tuple[str, str]]:
    """Yield (field, what to install) if the engine's packages are not there; imports nothing."""
    for module in CATALOGUE[name].modules:
        if importlib.util.find_spec(module) is None:
            yield "calibrate.engine", f"{name} needs {module.replace('_', '-')}; pip install 'qft[calibrate]'"
