"""What `qft eval` is asked beside its targets."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qft.errors import RecipeError
from qft.measure.scores import SCORES
from qft.plan.packages import missing_packages
from qft.recipe import Recipe
from qft.serving.options import EngineOptions


@dataclass(frozen=True)
class EvalOptions:
    """What the command line says beside the targets."""

    adapter: Path | None = None
    data: str | None = None
    window: int = 512
    """Tokens of a window over plain text."""
    stride: int = 256
    """Tokens from one window to the next."""
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    """Scores, beside those of the recipe."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, beside those of the recipe."""
    batch_size: int = 8
    """Rows that are read at once; with a url, that are asked at once."""
    kl_tokens: int = 8192
    """Tokens over which distributions are compared; each takes 4 bytes times the vocabulary on disk."""
    layers: bool = False
    """Measure what quantizing did to each linear layer, against the reference."""
    advise: bool = False
    """Hold the one run that is named in other ways too, and tell what to try next."""
    out: Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)


def with_metrics(recipe: Recipe, more: Iterable[str]) -> Recipe:
    """The recipe with `more` scores among its eval.metrics. Raises RecipeError for what cannot be scored."""
    metrics = tuple(dict.fromkeys((*recipe.eval.metrics, *more)))
    problems = [f"--metric {name}: is none of {', '.join(SCORES)}" for name in metrics if name not in SCORES]
    if "regex" in metrics and recipe.eval.regex is None:
        problems.append("--metric regex: looks for eval.regex, which only a recipe has")
    problems += [f"{name}: {text}" for name, text in missing_packages(metrics)]
    if problems:
        raise RecipeError(problems)
    return recipe.having(eval=recipe.eval.having(metrics=metrics))
