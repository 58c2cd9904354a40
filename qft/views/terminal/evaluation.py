"""The document of `qft eval` as rich tables."""

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from qft.documents.evaluation import Advice, EvalDocument, HarnessResult, LayerError, Score, TargetResult
from qft.views.terminal.table import Rows, Whole, bullets, spaced
from qft.views.words import recipe_lines, size

WORST_LAYERS = 5
"""Layers shown of each target; eval.json has all."""


def render_comparison(document: EvalDocument) -> Group:
    """Quality, task scores, and speed and memory, one row a target; tasks of the harness, one row a metric."""
    tables = {"scores": _scores, "harness": _harness, "layers": _layers}
    found = (draw(document) for field, draw in tables.items() if any(getattr(t, field) for t in document.targets))
    footnote = Text(_footnote(document), style="dim")
    loads = [_loads(document)] if any(t.served_by and t.served_by.loads for t in document.targets) else []
    quality = [_quality(document)] if any(t.perplexity_interval for t in document.targets) else []
    costs = [_costs(document)] if any(t.decode_tokens_per_second for t in document.targets) else []
    return spaced(*quality, *found, *costs, *loads, *_advice(document), footnote)


def _advice(document: EvalDocument) -> Iterator[Group]:
    """What was found, what to expect, and the lines of the recipe that bring it about."""
    if document.advice:
        yield Group(Text("What to try next", style="bold"), *(line for each in document.advice for line in _told(each)))


def _told(advice: Advice) -> Iterator[RenderableType]:
    yield from bullets([f"{advice.finding}. Expect {advice.gain}:"])
    yield from (Whole(f"    {line}") for line in recipe_lines(advice.recipe))


def _quality(document: EvalDocument) -> Rows:
    rows = Rows("Quality", "target", "perplexity", "change", "bits/byte", "KL mean", "KL 99%", "same top")
    for target in document.targets:
        figures = (_perplexity(target.perplexity_interval), _change(target.perplexity_change))
        rows.add(_name(target), *figures, _shown(target.bits_per_byte, ".4f"), *_divergence(target))
    return rows


def _perplexity(score: Score | None) -> str:
    return f"{score.value:.3f} ±{(score.high - score.low) / 2:.3f}" if score else ""


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _divergence(target: TargetResult) -> tuple[str, str, str]:
    if target.kl_mean is None or target.kl_p99 is None or target.top1_agreement is None:
        return ("", "", "")
    return f"{target.kl_mean:.4f}", f"{target.kl_p99:.3f}", f"{target.top1_agreement:.1%}"


def _scores(document: EvalDocument) -> Rows:
    names = list(document.targets[0].scores)
    rows = Rows("Scores (95% interval)", "target", *(name.replace("_", " ") for name in names))
    for target in document.targets:
        rows.add(_name(target), *(_share(target.scores[name]) for name in names))
    return rows


def _harness(document: EvalDocument) -> Rows:
    rows = Rows("lm-evaluation-harness (± standard error)", "task", "metric", "samples", *map(_name, document.targets))
    for same in zip(*(target.harness for target in document.targets), strict=True):
        metric = ", ".join(filter(None, (same[0].metric, same[0].filter)))
        rows.add(same[0].task, metric, f"{same[0].samples:,}", *map(_measured, same))
    return rows


def _measured(found: HarnessResult) -> str:
    value = "not finite" if found.value is None else f"{found.value:.4g}"
    return value if found.stderr is None else f"{value} ±{found.stderr:.2g}"


def _layers(document: EvalDocument) -> Rows:
    rows = Rows("Layers furthest from the reference", "target", "layer", "SNR", "weight error", "outliers", "bytes")
    for target in document.targets:
        for figures in most_disturbed(target.layers):
            rows.add(_name(target), *figures)
    return rows


def most_disturbed(layers: Iterable[LayerError]) -> Iterator[tuple[str, ...]]:
    """Name, signal to noise, weight error, outliers and bytes of the layers furthest from the reference."""
    for layer in sorted(layers, key=lambda layer: layer.output_snr_db)[:WORST_LAYERS]:
        shares = (f"{layer.weight_error:.2%}", f"{layer.outlier_share:.2%}")
        yield layer.name, f"{layer.output_snr_db:.1f} dB", *shares, size(layer.bytes)


def _costs(document: EvalDocument) -> Rows:
    rows = Rows("Speed and memory", "target", "read tok/s", "write tok/s", "weights", "peak", "on disk")
    for target in document.targets:
        speeds = (_shown(target.prefill_tokens_per_second, ",.0f"), _shown(target.decode_tokens_per_second, ",.1f"))
        bytes_ = (target.weight_bytes, target.peak_bytes, target.disk_bytes)
        rows.add(_name(target), *speeds, *("" if count is None else size(count) for count in bytes_))
    return rows


def _loads(document: EvalDocument) -> Rows:
    rows = Rows("Asked at once", "target", "engine", "requests", "tok/s", "first token")
    for target, served in ((target, target.served_by) for target in document.targets):
        for load in served.loads if served else ():
            engine = f"{served.engine} {served.version or ''}".strip() if served else ""
            speed = (f"{load.tokens_per_second:,.1f}", f"{load.first_token_seconds * 1000:,.0f} ms")
            rows.add(_name(target), engine, str(load.concurrent), *speed)
    return rows


def _footnote(document: EvalDocument) -> str:
    scored = f"{document.targets[0].eval_tokens:,} tokens of " if document.targets[0].eval_tokens else ""
    context = f", windows of {document.window} tokens every {document.stride}" if document.window else ""
    against = f"; compared with {document.reference}" if document.reference else ""
    return f"{scored}{document.rows:,} passages{context}{against}; on {document.device}"


def _name(target: TargetResult) -> str:
    """The last part of the path, with the variant: a table has no room for more."""
    return target.name.rstrip("/").rpartition("/")[2]


def _change(score: Score | None) -> str:
    return f"{score.value:+.1%} [{score.low:+.1%}, {score.high:+.1%}]" if score else ""


def _share(score: Score) -> str:
    return f"{score.value:.1%} [{score.low:.1%}, {score.high:.1%}]"
