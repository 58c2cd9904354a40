"""The documents as pages: one HTML file each that loads nothing, runs nothing, and reads well on paper or a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from qft.documents.evaluation import EvalDocument, HarnessResult, Score, TargetResult
from qft.documents.part import Part
from qft.documents.training import Evaluation, Report
from qft.views.html import pictures
from qft.views.html.pictures import Picture, interval, number, percent, plain, shorten
from qft.views.words import si, size

__all__ = ["AnswerPair", "TargetAnswer", "evaluation_page", "training_page"]

SAMPLES = 20
"""Most sample predictions shown."""
LONGEST = 1200
"""Most characters shown of a prompt or an answer; less of each where many are side by side."""


@dataclass(frozen=True)
class AnswerPair:
    """A held-out row, and what the model said to it before and after the training."""

    place: str
    """Where the row is: `rows.jsonl:17`."""
    prompt: str
    expected: str
    before: str | None
    """None where it was not asked."""
    after: str | None
    before_right: bool | None = None
    """None where nothing judged it."""
    after_right: bool | None = None


@dataclass(frozen=True)
class TargetAnswer:
    """A row, and what one target said to it."""

    place: str
    prompt: str
    expected: str
    given: str
    right: bool | None = None


class _Markup(str):
    """HTML, as against a text that is still to be escaped."""


def training_page(report: Report, answers: Sequence[AnswerPair] = ()) -> str:
    """The report of a training. The same report and answers give the same bytes."""
    samples = [
        _Sample(
            a.place, a.prompt, a.expected, {"Before": (a.before, a.before_right), "After": (a.after, a.after_right)}
        )
        for a in answers
    ]
    samples.sort(key=lambda s: (s.given["After"][1] is not False, s.given["Before"][1] is not False))
    learning = (pictures.loss(report), pictures.learning_rate(report))
    speed = (pictures.throughput(report), pictures.phases(report))
    model = report.model
    return _page(
        f"Training of {PurePath(report.run).name or report.run}",
        f"{model.path}: {model.architecture}, {si(model.parameters)} parameters, on {model.device}.",
        {
            "Headline figures": _headline(_training_headline(report)),
            "Advice": _advice(report.advice),
            "Learning": _pictures(learning) + _held_out(report),
            "Memory": _pictures([pictures.memory(report)]),
            "Speed": _pictures(speed),
            "Data": _pictures([pictures.lengths(report)]),
            "Sample predictions": _samples(samples),
            "Every figure": "".join(_every_figure("The run", report)),
        },
    )


def evaluation_page(document: EvalDocument, answers: Mapping[str, Sequence[TargetAnswer]] = {}) -> str:
    """What an evaluation measured. `answers` are by the names of the targets."""
    targets, reference = document.targets, document.reference
    metrics = list(dict.fromkeys(metric for t in targets for metric in t.scores))
    by_metric = [pictures.scores(f"score{i}", m, targets, reference) for i, m in enumerate(metrics)]
    edges = pictures.levels(targets)
    with_layers = [t for t in targets if t.layers]
    heat = [pictures.layers(f"layers{i}", t, edges) for i, t in enumerate(with_layers)]
    data = ", ".join(document.data) or "unnamed data"
    compared = f" compared with {reference}" if reference else ""
    return _page(
        f"Evaluation of {_count(len(targets), 'target')}",
        f"{_count(document.rows, 'row')} of {data}{compared}, on {document.device}.",
        {
            "Headline figures": _headline(_evaluation_headline(targets, reference)),
            "Targets": _quality_table(document, metrics) + _cost_table(targets),
            "Quality and size": _pictures([pictures.quality(targets, reference)]),
            "Scores": _pictures(by_metric) or f"<p>{_missing('No score was measured.')}</p>",
            "Harness": _harness(targets),
            "Layers": _layers(with_layers, heat),
            "Sources": _sources(targets),
            "Sample predictions": _samples(_side_by_side([t.name for t in targets], answers)),
            "How it was measured": _conditions(document),
        },
    )


# ---------------------------------------------------------------------------------------------------- sections, shared


def _page(title: str, about: str, sections: Mapping[str, str]) -> str:
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<li><a href="#{ids[name]}">{name}</a></li>' for name in sections)
    body = "".join(
        f'<section id="{ids[name]}" aria-labelledby="{ids[name]}-h"><h2 id="{ids[name]}-h">{name}</h2>'
        f"{content}</section>"
        for name, content in sections.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
<header><h1>{_text(title)}</h1><p>{_text(about)}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">{body}</main>
<footer><p>Written by qft. This file loads nothing and runs nothing.</p></footer>
</body>
</html>
"""


def _text(value: object) -> str:
    return value if isinstance(value, _Markup) else escape(plain(value))


def _missing(text: str = "not measured") -> _Markup:
    return _Markup(f'<span class="missing">{_text(text)}</span>')


def _headline(figures: Iterable[tuple[str, str | None, str]]) -> str:
    """Cards of [what, figure, more about it]."""
    cards = (
        f"<div><dt>{_text(what)}</dt><dd>{_missing() if figure is None else _text(figure)}</dd>"
        f'<dd class="more">{_text(more)}</dd></div>'
        for what, figure, more in figures
    )
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A table that scrolls within itself; the first column names the row, and the others are numbers unless `words`."""
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">'
        f"<table{' class=words' if words else ''}><caption>{_text(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str) -> str:
    return _missing() if cell == "not measured" else _text(cell)


def _pictures(made: Sequence[Picture]) -> str:
    return f'<div class="pictures">{"".join(map(_figure, made))}</div>' if made else ""


def _figure(picture: Picture) -> str:
    title, said, name = _text(picture.title), _text(picture.sentence), picture.name
    if not picture.svg:
        return f"<figure><h3>{title}</h3><p>{_missing(picture.sentence)}</p></figure>"
    key = "".join(f'<li><span class="look {look}"></span>{_text(label)}</li>' for look, label in picture.key)
    table = _table(picture.title, picture.head, picture.rows)
    shown = len(picture.rows)
    part = f": {shown} of {picture.measured:,} rows" if shown < picture.measured else ""
    return (
        f'<figure><h3>{title}</h3><p aria-hidden="true">{said}</p>'
        f'<svg viewBox="0 0 {pictures.WIDTH} {picture.height:g}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{title}</title><desc id="{name}-d">{said}</desc>{picture.svg}</svg>'
        + (f'<ul class="key">{key}</ul>' if key else "")
        + f"<details><summary>As a table{part}</summary>{table}</details>"
        "</figure>"
    )


@dataclass(frozen=True)
class _Sample:
    place: str
    prompt: str
    expected: str
    given: Mapping[str, tuple[str | None, bool | None]]
    """By who or when: the answer, and whether it is right."""


def _samples(samples: Sequence[_Sample]) -> str:
    if not samples:
        return f"<p>{_missing('No answers were kept.')}</p>"
    shown = samples[:SAMPLES]
    note = f"{len(shown)} of {len(samples)} rows" if len(shown) < len(samples) else _count(len(shown), "row")
    return f"<p>{note}, the wrong ones first.</p>" + "".join(_sample(s, i < 2) for i, s in enumerate(shown))


def _sample(sample: _Sample, is_open: bool) -> str:
    verdicts = _verdicts({name: right for name, (_, right) in sample.given.items()})
    most = min(LONGEST, 5 * LONGEST // len(sample.given))
    parts: dict[str, tuple[str | None, bool | None]] = {
        "Prompt": (sample.prompt, None),
        "Expected": (sample.expected, None),
    }
    shown = [*parts.items(), *sample.given.items()]
    blocks = "".join(
        f"<div><h3>{_text(name)} {_verdict(right)}</h3>"
        f"{_missing('not asked') if text is None else _pre(text, most)}</div>"
        for name, (text, right) in shown
    )
    return (
        f'<details class="sample"{" open" if is_open else ""}><summary><span class="place">{_text(sample.place)}</span>'
        f'{verdicts}</summary><div class="answers">{blocks}</div></details>'
    )


def _verdicts(judged: Mapping[str, bool | None]) -> str:
    """Of each, or of many how many are wrong."""
    if len(judged) <= 3:
        each = (f"{_text(shorten(name, 24))} {_verdict(right)}" for name, right in judged.items() if right is not None)
        return "".join(f'<span class="verdict">{one}</span>' for one in each)
    wrong = sum(right is False for right in judged.values())
    return f'<span class="verdict">{wrong} of {len(judged)} {_verdict(False)}</span>'


def _verdict(right: bool | None) -> str:
    return "" if right is None else '<b class="right">right</b>' if right else '<b class="wrong">wrong</b>'


def _pre(text: str, most: int) -> str:
    """The text as it is, without its middle if it is long."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
    return f'<pre dir="auto">{_text(text)}</pre>'


# ------------------------------------------------------------------------------------------------------- of a training


def _training_headline(report: Report) -> Iterator[tuple[str, str | None, str]]:
    before, after, memory = report.eval.before, report.eval.after, report.memory
    yield "Training loss", number(report.loss.last), f"from {number(report.loss.first)}"
    if after is None:
        yield "Held-out loss", None, ""
    else:
        start = f"from {number(before.loss)}; " if before else ""
        yield "Held-out loss", number(after.loss), f"{start}perplexity {number(after.perplexity)}"
        for name, share in after.scores.items():
            first = before.scores.get(name) if before else None
            came = f"from {percent(first)}, " if first is not None else ""
            yield name.replace("_", " ").capitalize(), percent(share), f"{came}{after.rows:,} held-out rows"
    speed = report.throughput
    yield "Throughput", f"{speed.tokens_per_second:,.0f}", f"tokens/s; {speed.samples_per_second:.2f} rows/s"
    on_gpu = memory.peak_gpu_bytes > 0
    peak = memory.peak_gpu_bytes if on_gpu else memory.peak_host_bytes
    yield f"Peak memory, {'GPU' if on_gpu else 'process'}", size(peak), f"of {size(memory.device_bytes)}"
    yield "Time", _duration(report.wall_seconds), f"{_count(report.steps, 'step')}, {si(report.tokens)} tokens"
    model = report.model
    yield "Trained", f"{model.trainable_share:.2%}", f"{si(model.trainable_parameters)} parameters"
    yield "Base", f"{model.bits_per_weight:.2f} bits", f"a weight: {_held(report)}"


def _held(report: Report) -> str:
    model = report.model
    return model.dtype if model.scheme == "none" else " ".join(filter(None, (model.scheme, model.quant_type)))


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _advice(advice: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in advice)
    return f'<ul class="advice">{items}</ul>' if items else "<p>Nothing in the figures calls for a change.</p>"


def _held_out(report: Report) -> str:
    found = [
        ("before", report.eval.before),
        *(("during", e) for e in report.eval.history),
        ("after", report.eval.after),
    ]
    measured = [(when, e) for when, e in found if e is not None]
    if not measured:
        return f"<p>{_missing('Held-out rows: not measured.')}</p>"
    metrics = list(dict.fromkeys(name for _, e in measured for name in e.scores))
    head = (
        "When",
        "Step",
        "Loss",
        "Perplexity",
        *(m.replace("_", " ").capitalize() for m in metrics),
        "Tokens",
        "Rows",
    )
    few = pictures.evenly(measured)
    caption = "Held-out rows" + (f", {len(few)} of {len(measured)} evaluations" if len(few) < len(measured) else "")
    return _table(caption, head, (_evaluation_row(when, e, metrics) for when, e in few))


def _evaluation_row(when: str, e: Evaluation, metrics: Iterable[str]) -> tuple[str, ...]:
    scores = (percent(e.scores[name]) if name in e.scores else "not measured" for name in metrics)
    return (when, f"{e.step:,}", number(e.loss), number(e.perplexity), *scores, f"{e.tokens:,}", f"{e.rows:,}")


def _every_figure(name: str, part: Part) -> Iterator[str]:
    """A table for each part of the document, from its fields and their docstrings."""
    fields = type(part).model_fields
    values = {field: getattr(part, field) for field in fields}
    parts = {field: value for field, value in values.items() if isinstance(value, Part)}
    rows = (
        (field.replace("_", " "), _value(part, field, value), fields[field].description or "")
        for field, value in values.items()
        if field not in parts
    )
    yield _table(name, ("Figure", "Value", "Meaning"), rows, words=True)
    for field, value in parts.items():
        own = field.replace("_", " ")
        yield from _every_figure(own.capitalize() if isinstance(part, Report) else f"{name}, {own}", value)


def _value(part: Part, field: str, value: Any) -> str:
    if value is None:
        return {"quant_type": "none", "checkpointing": "off"}.get(field, "not measured")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field.startswith("peak_gpu") and not value:
        return "not measured"
    if isinstance(value, list):
        return f"{len(value):,} of them, shown above" if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {percent(share)}" for name, share in value.items()) or "not measured"
    kind = type(part).__name__
    if kind == "Components" or field.endswith("bytes"):
        return f"{size(value)} ({value:,} bytes)"
    if kind == "Phases" or field.endswith("share"):
        return f"{value:.2%}"
    if "seconds" in field:
        return f"{value:,.4g} s"
    return f"{value:,}" if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------- of an evaluation


def _evaluation_headline(
    targets: Sequence[TargetResult], reference: str | None
) -> Iterator[tuple[str, str | None, str]]:
    if not targets:
        yield "Targets", None, ""
        return
    best = min(targets, key=lambda t: t.perplexity)
    yield "Lowest perplexity", number(best.perplexity), best.name
    small = min(targets, key=lambda t: (t.weight_bytes, t.perplexity))
    yield "Weights, fewest bytes", size(small.weight_bytes), small.name
    fast = max(targets, key=lambda t: t.decode_tokens_per_second)
    yield "Tokens/s when writing, most", number(fast.decode_tokens_per_second), fast.name
    close = [t for t in targets if t.kl_mean is not None and t.name != reference]
    nearest = min(close, key=lambda t: t.kl_mean or 0.0, default=None)
    if nearest is None:
        yield "KL from the reference, least", None, ""
    else:
        yield "KL from the reference, least", _optional(nearest.kl_mean), nearest.name


def _optional(value: float | None) -> str:
    return "not measured" if value is None else number(value)


def _with_interval(score: Score | None, show: Callable[[float], str]) -> str:
    if score is None:
        return "not measured"
    return _Markup(f"{show(score.value)}<small>{interval(score, show)}</small>")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _quality_table(document: EvalDocument, metrics: Sequence[str]) -> str:
    def row(t: TargetResult) -> Iterator[str]:
        is_reference = t.name == document.reference
        yield _Markup(f"{_text(t.name)}<small>reference</small>") if is_reference else t.name
        yield _Markup(f"{number(t.perplexity)}<small>{interval(t.perplexity_interval)}</small>")
        yield "reference" if is_reference else _with_interval(t.perplexity_change, "{:+.1%}".format)
        yield number(t.bits_per_byte)
        yield from (
            ("reference",) * 3
            if is_reference and t.kl_mean is None
            else (
                _optional(t.kl_mean),
                _optional(t.kl_p99),
                "not measured" if t.top1_agreement is None else percent(t.top1_agreement),
            )
        )
        for metric in metrics:
            yield _with_interval(t.scores.get(metric), percent)
            if changed:
                yield "reference" if is_reference else _with_interval(t.score_changes.get(metric), _points)

    changed = any(t.score_changes for t in document.targets)
    names = [name.replace("_", " ").capitalize() for name in metrics]
    scores = [head for name in names for head in ((name, f"{name}, change") if changed else (name,))]
    head = ("Target", "Perplexity", "Change", "Bits per byte", "KL, mean", "KL, 99%", "Same top token", *scores)
    caption = (
        "Quality: 95% intervals below their figures; changes against the reference, of scores in points; KL in nats"
    )
    return _table(caption, head, (tuple(row(t)) for t in document.targets))


def _cost_table(targets: Iterable[TargetResult]) -> str:
    rows = (
        (
            t.name,
            number(t.prefill_tokens_per_second),
            number(t.decode_tokens_per_second),
            size(t.weight_bytes),
            size(t.peak_bytes),
            size(t.disk_bytes) if t.disk_bytes else "in memory only",
            f"{t.eval_tokens:,}",
            f"{t.kl_tokens:,}" if t.kl_tokens else "not measured",
        )
        for t in targets
    )
    head = ("Target", "Prefill, tokens/s", "Decode, tokens/s", "Weights", "Peak memory", "On disk", "Scored tokens")
    return _table("Speed and size", (*head, "Tokens of the KL"), rows)


def _harness(targets: Sequence[TargetResult]) -> str:
    by_target = [{(r.task, r.metric, r.filter): r for r in t.harness} for t in targets]
    found = {key: r for results in by_target for key, r in results.items()}
    if not found:
        return f"<p>{_missing('No task of lm-evaluation-harness was run.')}</p>"

    def cell(r: HarnessResult | None) -> str:
        if r is None:
            return "not measured"
        value = "not finite" if r.value is None else number(r.value)
        return value if r.stderr is None else _Markup(f"{value}<small>± {number(r.stderr)}</small>")

    rows = (
        (
            task,
            metric if used is None else _Markup(f"{_text(metric)}<small>{_text(used)}</small>"),
            *(cell(results.get(key)) for results in by_target),
            f"{found[key].samples:,}",
        )
        for key in found
        for task, metric, used in (key,)
    )
    caption = "Tasks of lm-evaluation-harness, with the standard errors that it knows"
    return _table(caption, ("Task", "Metric", *(t.name for t in targets), "Samples"), rows)


def _layers(targets: Sequence[TargetResult], heat: Sequence[Picture]) -> str:
    if not targets:
        return f"<p>{_missing('The layers were not measured.')}</p>"
    about = (
        "Signal to noise of each layer's output against the reference's, in decibels: the stronger the colour, the "
        "more quantizing disturbed it. A colour means the same in every picture; where a block has several layers of "
        "a kind, it is that of the lowest."
    )
    tables = (
        _table(
            f"The most disturbed layers of {plain(t.name)}",
            ("Layer", "Output SNR, dB", "Weight error", "Outliers", "Bytes"),
            (
                (x.name, f"{x.output_snr_db:.1f}", number(x.weight_error), f"{x.outlier_share:.2%}", size(x.bytes))
                for x in sorted(t.layers, key=lambda x: x.output_snr_db)[:8]
            ),
        )
        for t in targets
    )
    worst = f"<details><summary>The most disturbed layers</summary>{''.join(tables)}</details>"
    return f"<p>{about}</p>{_pictures(heat)}{worst}"


def _sources(targets: Sequence[TargetResult]) -> str:
    names = list(dict.fromkeys(s.source for t in targets for s in t.by_source))
    if not names:
        return f"<p>{_missing('The sources were not measured apart.')}</p>"

    def row(target: TargetResult) -> Iterator[str]:
        found = {s.source: s for s in target.by_source}
        yield target.name
        for name in names:
            own = found.get(name)
            tokens = f"<small>{own.eval_tokens:,} tokens</small>" if own else ""
            yield _Markup(number(own.perplexity) + tokens) if own else "not measured"

    return _table("Perplexity by source", ("Target", *names), (tuple(row(t)) for t in targets))


def _side_by_side(names: Sequence[str], answers: Mapping[str, Sequence[TargetAnswer]]) -> list[_Sample]:
    """The rows that targets answered, those with most wrong answers first."""
    order = [name for name in names if name in answers] + [name for name in answers if name not in names]
    rows: dict[tuple[str, str], tuple[str, dict[str, tuple[str | None, bool | None]]]] = {}
    for name in order:
        for a in answers[name]:
            _, given = rows.setdefault((a.place, a.prompt), (a.expected, dict.fromkeys(order, (None, None))))
            given[name] = a.given, a.right
    samples = [_Sample(place, prompt, expected, given) for (place, prompt), (expected, given) in rows.items()]
    return sorted(samples, key=lambda s: -sum(right is False for _, right in s.given.values()))


def _conditions(document: EvalDocument) -> str:
    window = "each row by itself" if document.window is None else f"{document.window:,} tokens"
    rows = [
        ("Data", ", ".join(document.data) or "not named"),
        ("Rows", f"{document.rows:,}"),
        ("Window", window),
        ("Stride", "none" if document.stride is None else f"{document.stride:,} tokens"),
        ("Reference", document.reference or "none"),
        ("Device", document.device),
        ("Seed", str(document.seed)),
        ("Time", _duration(document.wall_seconds)),
        *((f"Version of {name}", version or "not installed") for name, version in document.versions.items()),
    ]
    return _table("Conditions", ("What", "Value"), rows, words=True)


LIGHT = (
    "--page:#fafaf8;--card:#fff;--ink:#1d2125;--muted:#5a6068;--line:#e2e4e7;--link:#0063a0;--right:#0a6b3d;"
    "--wrong:#a32020;--c1:#0072b2;--c2:#c2500a;--c3:#00805c;--c4:#a8518a;--c5:#946b00;--c6:#868e98;"
    "--h0:#611c00;--h1:#8f3200;--h2:#bf4f10;--h3:#dd7a3c;--h4:#eca272;--h5:#f4c3a1;--h6:#f9dcc8;--h7:#fcebdf"
)
DARK = (
    "--page:#121416;--card:#1a1d20;--ink:#e6e8ea;--muted:#a9b0b8;--line:#31363b;--link:#7cc0f5;--right:#6fd3a0;"
    "--wrong:#ff9c8f;--c1:#56b4e9;--c2:#f0803c;--c3:#2cc295;--c4:#de93be;--c5:#e6b830;--c6:#7d8791;"
    "--h0:#ffe9d6;--h1:#ffcb9f;--h2:#f7a466;--h3:#dc7d3a;--h4:#b05e26;--h5:#83451c;--h6:#5c3319;--h7:#432a1a"
)
LOOKS = "".join(f".{c}{{--own:var(--{c})}}" for c in [*(f"c{i}" for i in range(1, 7)), *(f"h{i}" for i in range(8))])
CSS = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
*{{box-sizing:border-box}}
html{{scroll-padding-top:1rem}}
body{{margin:0 auto;max-width:66rem;padding:2.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:1rem/1.55 system-ui,sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem;font-weight:650}}
h2{{font-size:1.3rem;margin:0 0 1rem;font-weight:650}}
h3{{font-size:1rem;margin:0 0 .25rem;font-weight:600}}
p{{margin:0 0 1rem;max-width:46rem}}
header p,footer,figure p,.more,caption,small,nav{{color:var(--muted)}}
section{{margin:3rem 0 0}}
a{{color:var(--link)}}
:focus-visible{{outline:3px solid var(--link);outline-offset:2px;border-radius:4px}}
main:focus{{outline:none}}
.skip{{position:absolute;left:1rem;top:-4rem;padding:.5rem 1rem;background:var(--card);border-radius:4px}}
.skip:focus{{top:.5rem}}
nav ul{{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;padding:.75rem 0 0;margin:1.5rem 0 0;
border-top:1px solid var(--line)}}
nav a{{display:inline-block;padding:.2rem 0;text-underline-offset:.2em}}
.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,13.5rem),1fr));gap:1rem;margin:0}}
.cards div,figure,.sample{{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem 1.25rem}}
dt{{color:var(--muted);font-size:.875rem}}
dd{{margin:0;font-size:1.5rem;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums}}
dd.more{{font-size:.875rem;font-weight:400;margin-top:.15rem}}
.advice{{margin:0;padding-left:1.2rem;max-width:46rem}}
.advice li{{margin:0 0 .5rem}}
.pictures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem}}
.pictures+.scroll,.scroll+.scroll{{margin-top:1.5rem}}
.pictures+p{{margin-top:1rem}}
figure{{margin:0;min-width:0;max-width:38rem;display:flex;flex-direction:column}}
@media (min-width:52rem){{.pictures>figure:only-child{{display:grid;grid-template-columns:2fr 3fr;
grid-template-rows:auto auto auto 1fr;column-gap:2rem;grid-column:1/-1;max-width:none}}
figure:only-child>*{{grid-column:1;align-self:start}}
figure:only-child>svg{{grid-column:2;grid-row:1/span 4;max-width:29rem;justify-self:end}}
figure:only-child>details{{margin-top:0}}}}
figure p{{font-size:.875rem;margin:0 0 .75rem}}
figure svg{{display:block;width:100%;max-width:29rem;height:auto;color:var(--ink)}}
svg *{{stroke-linejoin:round}}
svg text{{fill:currentColor;font-family:inherit}}
.key{{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.5rem 0 0;padding:0;font-size:.8125rem}}
.key li{{display:flex;align-items:center;gap:.45rem}}
{LOOKS}
.ink{{--own:var(--ink)}}
.look{{flex:none;width:1.4rem;border-top:3px solid var(--own)}}
.thin{{border-top-width:1px}}
.dashed{{border-top:2px dashed var(--own)}}
.dashdot{{border-top:2px dotted var(--own)}}
.area,.cell{{height:.8rem;width:.8rem;border:0;border-radius:2px;background:var(--own)}}
.dots{{height:.55rem;width:.55rem;border:0;border-radius:50%;background:var(--own)}}
.dots.c2{{border-radius:0;transform:rotate(45deg)}}
.cross{{border:0;width:auto}}
.cross::before{{content:"\\d7";color:var(--muted)}}
details{{margin:.75rem 0 0}}
figure details{{margin-top:auto;padding-top:.75rem}}
summary{{cursor:pointer;color:var(--link);font-size:.875rem;padding:.2rem 0}}
.scroll{{overflow-x:auto;max-width:100%}}
figure .scroll{{max-height:22rem;overflow-y:auto}}
table{{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}}
caption{{text-align:left;padding:0 0 .5rem;font-size:.875rem}}
th,td{{padding:.4rem .9rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}}
thead th{{color:var(--muted);font-weight:500;white-space:normal;vertical-align:bottom;min-width:5.5rem}}
th:first-child{{text-align:left;padding-left:0;font-weight:500;white-space:normal;min-width:8.5rem;max-width:16rem;
overflow-wrap:anywhere;position:sticky;left:0;background:var(--page)}}
figure th:first-child{{background:var(--card);min-width:5rem}}
td small,th small{{display:block;font-size:.75rem;font-weight:400}}
.words{{width:100%;min-width:30rem;table-layout:fixed}}
.words th:first-child{{width:26%}}
.words th:nth-child(2):not(:last-child){{width:32%}}
.words th,.words td{{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:7rem}}
.missing{{color:var(--muted);font-style:italic;font-weight:400;font-size:.875rem}}
.sample summary{{display:flex;flex-wrap:wrap;gap:.25rem 1rem;color:var(--ink)}}
.sample summary::before{{content:"\\25b8";color:var(--link)}}
.sample[open] summary::before{{content:"\\25be"}}
.place{{font-weight:600;flex:1 1 10rem}}
.verdict{{color:var(--muted)}}
.right{{color:var(--right)}}
.wrong{{color:var(--wrong)}}
.sample h3{{font-size:.8125rem;color:var(--muted)}}
.answers{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem;margin-top:.75rem}}
pre{{margin:0;padding:.75rem;background:var(--page);border-radius:4px;font:.8125rem/1.5 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}}
footer{{margin-top:4rem;font-size:.875rem}}
@media (max-width:30rem){{body{{padding-top:1.5rem}}.cards{{grid-template-columns:1fr 1fr;gap:.5rem}}
.cards div,figure,.sample{{padding:.75rem}}dd{{font-size:1.2rem}}}}
@media print{{:root{{color-scheme:light;{LIGHT}}}body{{max-width:none;padding:0}}nav,.skip{{display:none}}
table{{font-size:.7rem}}th,td,th:first-child{{white-space:normal;min-width:0;padding:.25rem .5rem .25rem 0}}
.words{{min-width:0}}figure,.cards div,tr{{break-inside:avoid}}h2{{break-after:avoid}}
.scroll{{overflow:visible;max-height:none}}
details::details-content{{content-visibility:visible;block-size:auto}}}}
"""
