"""The documents of `qft export` as rich tables."""

from collections.abc import Iterator, Sequence
from shlex import quote

from rich.console import Group
from rich.text import Text

from qft.documents.export import ExportDocument, LoadCheck
from qft.views.terminal.table import Rows, Whole, spaced
from qft.views.words import size

FORMS = {"kl": ".5f", "top1_agreement": ".1%", "perplexity_increase": "+.2%", "same_continuations": ".0%"}
"""Checks of the gate that are shown, and how."""


def render_exports(documents: Sequence[ExportDocument]) -> Group:
    """Each artifact with its figures, and where it lies."""
    rows = Rows("Exports", "target", "bytes", "KL", "same top", "perplexity", "same answers", "gate")
    for document in documents:
        checks = {check.name: check.value for check in document.gate.checks}
        verdict = {True: "passed", False: "refused", None: "NOT VERIFIED"}[document.gate.passed]
        figures = (_figure(checks.get(name), form) for name, form in FORMS.items())
        rows.add(document.target, size(document.bytes), *figures, verdict)
    served = [_served(documents)] if any(document.gate.served for document in documents) else []
    about = [Text(_quantized(document)) for document in documents if document.quantization]
    about += [Text(line) for document in documents for line in _exact(document)]
    if any(document.gate.passed is None for document in documents):
        off = "The gate was off: nothing proves that these are the model that was trained."
        about.append(Text(off, style="bold red"))
    return spaced(rows, *served, Group(*about, *(Whole(line) for document in documents for line in _places(document))))


def _served(documents: Sequence[ExportDocument]) -> Rows:
    """What the engine that will serve them found."""
    verdicts = {document.target: document.gate.served for document in documents if document.gate.served}
    by = ", ".join(sorted({f"{served.engine} {served.version}" for served in verdicts.values()}))
    rows = Rows(f"Served by {by}", "target", "KL", "same top", "perplexity", "same answers", "start, s", "tokens/s")
    for target, served in verdicts.items():
        checks = {check.name: check.value for check in served.checks}
        figures = (_figure(checks.get(name), form) for name, form in FORMS.items())
        start, speed = _figure(served.seconds_to_start, ".0f"), _figure(served.generated_per_second, ",.0f")
        rows.add(target, *figures, start, speed)
    return rows


def _places(document: ExportDocument) -> Iterator[str]:
    yield f"Written to {document.path}"
    if added := document.registered:
        elsewhere = "" if added.registry == "models" else f" --registry {quote(added.registry)}"
        next_step = f"qft models promote {added.name} {added.version}{elsewhere}"
        yield f"{added.name} v{added.version} added to {added.registry}; next: {next_step}"
    if pushed := document.pushed:
        yield f"Pushed to {pushed.repository}: {pushed.url}"


def render_loads(checks: Sequence[LoadCheck]) -> Group:
    """What each environment can load, and where that is written."""
    rows = Rows("Loads", "target", "format", "engine", "device", "loads", "source", unbroken=True)
    for check in checks:
        engine = " ".join(part for part in (check.engine, check.version) if part)
        verdict = {True: "yes", False: "no", None: "not known"}[check.loads]
        rows.add(check.target, check.format, engine, check.device or "", verdict, check.source or "")
    return spaced(rows)


def _figure(value: float | str | None, form: str) -> str:
    return format(value, form) if isinstance(value, float) else ""


def _exact(document: ExportDocument) -> Iterator[str]:
    """Of a run that was trained as it is rounded."""
    for check in document.gate.checks:
        if check.name == "different_weights" and isinstance(check.value, float):
            yield f"{document.target}: {check.value:,.0f} of the weights are not, to the bit, those that were trained"


def _quantized(document: ExportDocument) -> str:
    told = document.quantization or {}
    cost = f"KL {told['kl']:.5f} and {told['perplexity_change']:+.2%} of perplexity"
    by = told["engine"] + (f", since {told['not_searched']}" if "not_searched" in told else "")
    return f"{document.target}: quantizing the merged model again ({by}) cost {cost}"
