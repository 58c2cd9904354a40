"""The document of `qft calibrate` as rich tables."""

from rich.console import Group

from qft.documents.calibration import Attempt, CalibrationReport
from qft.views.terminal.evaluation import most_disturbed
from qft.views.terminal.table import Rows, Whole, bullets, spaced
from qft.views.words import share_held, size


def render_calibration(report: CalibrationReport) -> Group:
    """What it cost, the layers that lost most, and bytes, time and memory."""
    layers = [_layers(report)] if report.layers else []
    held = share_held(report.quantized_share)
    written = Whole(f"{f'{held} quantized. ' if held else ''}Written to {report.result}")
    return spaced(_quality(report), *layers, _costs(report), Group(*bullets(report.warnings, "yellow"), written))


def _quality(report: CalibrationReport) -> Rows:
    rows = Rows("Quality", "weights", "bytes", "perplexity", "change", "KL mean", "KL 99%", "same top")
    before = report.perplexity_before
    rows.add("unquantized", size(report.bytes_before), f"{before.value:.3f}", "", "", "", "")
    for attempt in report.attempts:
        change = attempt.perplexity_change
        changed = f"{change.value:+.2%} [{change.low:+.2%}, {change.high:+.2%}]"
        figures = (size(attempt.weight_bytes), f"{attempt.perplexity.value:.3f}", changed)
        distance = (f"{attempt.kl_mean:.4f}", f"{attempt.kl_p99:.3f}", f"{attempt.top1_agreement:.1%}")
        rows.add(_name(report, attempt), *figures, *distance)
    return rows


def _name(report: CalibrationReport, attempt: Attempt) -> str:
    scheme = report.scheme
    if method := scheme.get("quant_method"):  # of a plugin
        return f"{report.engine} {method}"
    group = f" g{scheme['group_size']}" if scheme["group_size"] > 0 else ""
    activations = "" if scheme["activations"] == "none" else f", {scheme['activations']} activations"
    kept = f", {len(attempt.kept)} layers in more bits" if attempt.kept else ""
    kept += ", distilled" if attempt.distilled_steps else ""
    maker = scheme.get("algorithm", report.engine)
    return f"{maker} {scheme['data_type']}{scheme['bits']}{group}{activations}{kept}".replace("nf44", "nf4")


def _layers(report: CalibrationReport) -> Rows:
    rows = Rows("Layers that lost most", "layer", "SNR", "weight error", "outliers", "bytes")
    for figures in most_disturbed(report.layers):
        rows.add(*figures)
    return rows


def _costs(report: CalibrationReport) -> Rows:
    rows = Rows("Costs", "rows", "tokens", "tokens/s", "time", "peak", "host peak")
    tokens = (report.calibration or {}).get("tokens", 0) + report.verify_tokens
    speed = f"{report.tokens_per_second:,.0f}" if report.block_seconds else ""
    figures = (f"{report.verify_rows} held out", f"{tokens:,}", speed, f"{report.wall_seconds:,.0f} s")
    rows.add(*figures, size(report.peak_bytes), size(report.peak_host_bytes))
    return rows
