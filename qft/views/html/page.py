"""The documents as pages: one HTML file each that loads nothing, runs nothing, and reads well on paper or a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qft.documents.evaluation import EvalDocument, HarnessResult, Load, Score, SourceResult, TargetResult
from qft.documents.part import Part, unit_of
from qft.documents.plan import DataPart
from qft.documents.training import Evaluation, Report, StageReport
from qft.views import words
from qft.views.html import evaluation_pictures, rows_pictures, training_pictures
from qft.views.html.chart import WIDTH, Cell, Table, evenly
from qft.views.html.evaluation_pictures import interval
from qft.views.words import count, duration, number, percent, plain, si, size

if TYPE_CHECKING:
    from qft.measure.scores import Answer  # which imports torch

SAMPLES = 20
"""Most sample predictions shown."""
LONGEST = 1200
"""Most characters shown of a prompt or an answer; less of each where many are side by side."""
SHORT: dict[str, Callable[[Any], str]] = {"bytes": size, "share": percent}
"""How figures are written, by their unit."""
LONG = SHORT | {
    "bytes": lambda count: f"{size(count)} ({count:,} bytes)",
    "seconds": "{:,.4g} s".format,
    "share": "{:.2%}".format,
}
NOTHING: dict[str, Cell] = {"checkpointing": "off", "disk_bytes": "in memory only", "quant_type": "none"}
NOTHING |= dict.fromkeys(("kl_tokens", "peak_gpu_bytes", "peak_gpu_reserved_bytes"))
"""What a field that is 0 or none says, where that is no figure; none says elsewhere that it was not measured."""


class Asked(NamedTuple):
    """A row, and what each target, or the model at each moment, said to it."""

    place: str
    """Where the row is: `rows.jsonl:17`."""
    prompt: str
    expected: str
    given: dict[str, tuple[str | None, bool | None]]
    """The text, None where it was not asked, and whether it is right, None where nothing judged it."""


def side_by_side(answers: Mapping[str, Sequence[Answer]], place: Callable[[int, int], str]) -> list[Asked]:
    """The rows that were answered, by the names of those who did."""
    rows: dict[tuple[int, int], Asked] = {}
    for name, each in answers.items():
        for a in each:
            new = Asked(place(a.source, a.row), a.prompt, a.expected, dict.fromkeys(answers, (None, None)))
            rows.setdefault((a.source, a.row), new).given[name] = a.given, a.right
    return list(rows.values())


def training_page(report: Report, answers: Sequence[Asked] = (), data: DataPart | None = None) -> str:
    """The report of a training, with what its plan says of its data. The same gives the same bytes."""
    return ENVIRONMENT.get_template("training.html.jinja").render(
        report=report,
        name=PurePath(report.run).name or report.run,
        headline=_training_headline(report),
        learning=[training_pictures.loss(report), training_pictures.learning_rate(report)],
        held_out=_held_out(report),
        stages=_stages(report),
        memory=training_pictures.memory(report),
        memory_by=[
            ("Peak memory by phase", _of_parts(report.memory.phases)),
            ("Memory at moments", _of_parts(report.memory.moments)),
        ],
        out_of_memory=_out_of_memory(report),
        speed=[training_pictures.throughput(report), training_pictures.phases(report)],
        lengths=training_pictures.lengths(report.lengths),
        data=rows_pictures.parts(data) if data else {},
        answers=sorted(answers, key=lambda row: [right is not False for _, right in reversed(row.given.values())]),
        parts=_every_figure("The run", report),
    )


def evaluation_page(document: EvalDocument, answers: Sequence[Asked] = ()) -> str:
    """What an evaluation measured."""
    targets, reference = document.targets, document.reference
    metrics = list(dict.fromkeys(metric for t in targets for metric in t.scores))
    edges = evaluation_pictures.levels(targets)
    with_layers = {f"layers{i}": t for i, t in enumerate(t for t in targets if t.layers)}
    return ENVIRONMENT.get_template("evaluation.html.jinja").render(
        document=document,
        headline=evaluation_pictures.headline(targets, reference),
        quality=_quality(document, metrics),
        costs=_costs(targets),
        loads=_loads(targets),
        by_size=evaluation_pictures.quality(targets, reference),
        scores=[evaluation_pictures.scores(f"score{i}", m, targets, reference) for i, m in enumerate(metrics)],
        harness=_harness(targets),
        maps=[evaluation_pictures.layers(name, t, edges) for name, t in with_layers.items()],
        disturbed={t.name: _disturbed(t) for t in with_layers.values()},
        sources=_sources(targets),
        answers=sorted(answers, key=lambda row: -sum(right is False for _, right in row.given.values())),
    )


def _middle_out(text: str, most: int) -> str:
    """The text as it is, without its middle if it is long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


ENVIRONMENT = Environment(
    loader=PackageLoader("qft.views.html", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if isinstance(value, Markup) else plain(value),
)
ENVIRONMENT.filters |= {name: getattr(words, name) for name in ("count", "duration", "recipe_lines", "shorten", "si")}
ENVIRONMENT.filters["middle_out"] = _middle_out
ENVIRONMENT.globals |= {"LONGEST": LONGEST, "SAMPLES": SAMPLES, "WIDTH": WIDTH}


def _above(figure: str, more: str) -> Markup:
    """A figure, and in small letters below it what belongs to it."""
    return Markup("{}<small>{}</small>").format(plain(figure), plain(more))


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _figure(part: Part, field: str, written: Mapping[str, Callable[[Any], str]] = SHORT) -> Cell:
    """A field of a document, as its unit is written."""
    value, unit = getattr(part, field), unit_of(type(part).model_fields[field])
    if value is None or (not value and field in NOTHING):
        return NOTHING.get(field)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(each, int) for each in value):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, list):
        return f"{len(value):,} of them, shown above" if value else "none"
    if isinstance(value, dict) and any(isinstance(each, Part) for each in value.values()):
        return f"{len(value)} of them, shown above"
    if isinstance(value, dict):
        return ", ".join(f"{name} {percent(share)}" for name, share in value.items()) or None
    if show := written.get(unit or ""):
        return show(value)
    return f"{value:,}" if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)


def _training_headline(report: Report) -> Iterator[tuple[str, Cell, str]]:
    """[what, figure, more about it]."""
    memory, model, speed = report.memory, report.model, report.throughput
    yield "Training loss", number(report.loss.last), f"from {number(report.loss.first)}"
    yield from _held_out_headline(report.eval.before, report.eval.after)
    yield "Throughput", f"{speed.tokens_per_second:,.0f}", f"tokens/s; {speed.samples_per_second:.2f} rows/s"
    where, peak = ("GPU", memory.peak_gpu_bytes) if memory.peak_gpu_bytes else ("process", memory.peak_host_bytes)
    yield f"Peak memory, {where}", size(peak), f"of {size(memory.device_bytes)}"
    yield "Time", duration(report.wall_seconds), f"{count(report.steps, 'step')}, {si(report.tokens)} tokens"
    yield "Trained", f"{model.trainable_share:.2%}", f"{si(model.trainable_parameters)} parameters"
    held = model.dtype if model.scheme == "none" else " ".join(filter(None, (model.scheme, model.quant_type)))
    share = words.share_held(model.quantized_share) if model.scheme != "none" else ""
    yield "Base", f"{model.bits_per_weight:.2f} bits", f"a weight: {', '.join(filter(None, (held, share)))}"


def _held_out_headline(before: Evaluation | None, after: Evaluation | None) -> Iterator[tuple[str, Cell, str]]:
    if after is None:
        yield "Held-out loss", None, ""
        return
    start = f"from {number(before.loss)}; " if before else ""
    yield "Held-out loss", number(after.loss), f"{start}perplexity {number(after.perplexity)}"
    for name, share in after.scores.items():
        start = f"from {percent(before.scores[name])}, " if before and name in before.scores else ""
        yield _title(name), percent(share), f"{start}{after.rows:,} held-out rows"


def _held_out(report: Report) -> Table:
    during = [("during", each) for each in report.eval.history]
    found = [("before", report.eval.before), *during, ("after", report.eval.after)]
    measured = [(when, each) for when, each in found if each is not None]
    metrics = list(dict.fromkeys(name for _, each in measured for name in each.scores))
    rows = [
        (
            when,
            *(_figure(each, field) for field in ("step", "loss", "perplexity")),
            *(percent(each.scores[name]) if name in each.scores else None for name in metrics),
            *(_figure(each, field) for field in ("tokens", "rows")),
        )
        for when, each in evenly(measured)
    ]
    head = ("When", "Step", "Loss", "Perplexity", *map(_title, metrics), "Tokens", "Rows")
    return Table(head, rows, len(measured))


def _stages(report: Report) -> Table | None:
    head = ("Stage", "Steps", "Held as", "Learning rate", "Loss", "Held out", "Tokens/s", "Peak", "Predicted")
    rows = [(str(number), *_stage_row(stage)) for number, stage in enumerate(report.stages, 1)]
    return Table(head, rows) if rows else None


def _stage_row(stage: StageReport) -> Iterator[Cell]:
    model, settings, speed = stage.model, stage.settings, stage.throughput
    yield f"{stage.first_step} to {stage.last_step}"
    yield _above(model.quant_type or model.scheme, f"{model.bits_per_weight:.2f} bits a weight") if model else None
    resets = [name for name in ("optimizer", "lr_scheduler") if getattr(settings, f"reset_{name}")]
    new = ", ".join([settings.optim, *(f"new {name}" for name in resets)])
    yield _above(f"{settings.lr_scheduler_type} from {settings.learning_rate:g}", new)
    yield _above(number(stage.loss.last), f"from {number(stage.loss.first)}") if stage.loss else None
    start = f"from {number(stage.before.loss)}" if stage.before else ""
    yield _above(number(stage.after.loss), start) if stage.after else None
    yield f"{speed.tokens_per_second:,.0f}" if speed else None
    yield _figure(stage, "peak_bytes")
    yield _figure(stage, "predicted_peak_bytes")


def _out_of_memory(report: Report) -> Table | None:
    fields = ("step", "phase", "asked_bytes", "field", "was", "now", "gradient_accumulation_steps")
    rows = [tuple(_figure(event, field) for field in fields) for event in report.out_of_memory]
    return Table(tuple(map(_title, fields)), rows) if rows else None


def _every_figure(name: str, part: Part) -> Iterator[tuple[str, Table]]:
    """A table for each part of the document, from its fields and their docstrings."""
    parts = {field: value for field, value in part if isinstance(value, Part)}
    rows = [
        (field.replace("_", " "), _figure(part, field, LONG), about.description or "")
        for field, about in type(part).model_fields.items()
        if field not in parts
    ]
    yield name, Table(("Figure", "Value", "Meaning"), rows)
    for field, value in parts.items():
        own = field.replace("_", " ")
        yield from _every_figure(own.capitalize() if isinstance(part, Report) else f"{name}, {own}", value)


def _of_parts(parts: Mapping[str, Part]) -> Table:
    """A row for each of the parts, which are of one kind, and a column for each of their fields."""
    fields = list(type(next(iter(parts.values()))).model_fields) if parts else []
    rows = [(_title(name), *(_figure(part, field) for field in fields)) for name, part in parts.items()]
    return Table(("", *(_title(field.removesuffix("_bytes")) for field in fields)), rows)


def _quality(document: EvalDocument, metrics: Sequence[str]) -> Table:
    changed = any(t.score_changes for t in document.targets)
    scores = [head for m in map(_title, metrics) for head in ((m, f"{m}, change") if changed else (m,))]
    head = ("Target", "Perplexity", "Change", "Bits per byte", "KL, mean", "KL, 99%", "Same top token", *scores)
    rows = [tuple(_quality_row(t, t.name == document.reference, metrics, changed)) for t in document.targets]
    return Table(head, rows)


def _quality_row(t: TargetResult, is_reference: bool, metrics: Sequence[str], changed: bool) -> Iterator[Cell]:
    yield _above(t.name, "reference") if is_reference else t.name
    yield _with_interval(t.perplexity_interval, number)
    yield "reference" if is_reference else _with_interval(t.perplexity_change, "{:+.1%}".format)
    yield _figure(t, "bits_per_byte")
    for field in ("kl_mean", "kl_p99", "top1_agreement"):
        yield "reference" if is_reference and t.kl_mean is None else _figure(t, field)
    for metric in metrics:
        yield _with_interval(t.scores.get(metric), percent)
        if changed:
            points = _with_interval(t.score_changes.get(metric), lambda share: f"{100 * share:+.1f}")
            yield "reference" if is_reference else points


def _with_interval(score: Score | None, show: Callable[[float], str]) -> Cell:
    return None if score is None else _above(show(score.value), interval(score, show))


def _costs(targets: Iterable[TargetResult]) -> Table:
    columns = {
        "Prefill, tokens/s": "prefill_tokens_per_second",
        "Decode, tokens/s": "decode_tokens_per_second",
        "Weights": "weight_bytes",
        "Peak memory": "peak_bytes",
        "On disk": "disk_bytes",
        "Scored tokens": "eval_tokens",
        "Tokens of the KL": "kl_tokens",
    }
    return Table(("Target", *columns), [(t.name, *(_figure(t, field) for field in columns.values())) for t in targets])


def _loads(targets: Iterable[TargetResult]) -> Table | None:
    fields = list(Load.model_fields)
    found = [(t, t.served_by.loads) for t in targets if t.served_by]
    rows = [(t.name, *(_figure(load, field) for field in fields)) for t, loads in found for load in loads]
    return Table(("Target", *map(_title, fields)), rows) if rows else None


def _harness(targets: Sequence[TargetResult]) -> Table | None:
    by_target = [{(r.task, r.metric, r.filter): r for r in t.harness} for t in targets]
    rows = [
        (
            r.task,
            _above(r.metric, r.filter) if r.filter else r.metric,
            *(_harness_cell(results.get(key)) for results in by_target),
            f"{r.samples:,}",
        )
        for key, r in {key: r for results in by_target for key, r in results.items()}.items()
    ]
    return Table(("Task", "Metric", *(t.name for t in targets), "Samples"), rows) if rows else None


def _harness_cell(r: HarnessResult | None) -> Cell:
    if r is None:
        return None
    value = "not finite" if r.value is None else number(r.value)
    return value if r.stderr is None else _above(value, f"± {number(r.stderr)}")


def _disturbed(target: TargetResult) -> Table:
    rows = [
        (x.name, f"{x.output_snr_db:.1f}", number(x.weight_error), f"{x.outlier_share:.2%}", size(x.bytes))
        for x in sorted(target.layers, key=lambda x: x.output_snr_db)[:8]
    ]
    return Table(("Layer", "Output SNR, dB", "Weight error", "Outliers", "Bytes"), rows)


def _sources(targets: Sequence[TargetResult]) -> Table | None:
    by_target = [(t.name, {s.source: s for s in t.by_source}) for t in targets]
    names = list(dict.fromkeys(name for _, found in by_target for name in found))
    rows = [(target, *(_source_cell(found.get(name)) for name in names)) for target, found in by_target]
    return Table(("Target", *names), rows) if names else None


def _source_cell(source: SourceResult | None) -> Cell:
    return None if source is None else _above(number(source.perplexity), f"{source.eval_tokens:,} tokens")
