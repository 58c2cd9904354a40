"""What can be done with a model, as rich tables."""

from rich.console import Group

from qft.documents.abilities import Abilities
from qft.views.terminal.plan import add_reasons
from qft.views.terminal.table import Facts, Whole, spaced
from qft.views.words import share_held, si


def render_abilities(found: Abilities) -> Group:
    """What `qft check MODEL` shows."""
    model = Facts("Model")
    model.add("path", Whole(found.path))
    model.add("is", f"{found.architecture}, {si(found.parameters)} parameters, {found.layers} blocks")
    if found.beside:
        model.add("beside text", f"{', '.join(found.beside)}: stay as they are")
    for mode, held in found.quantize.items():
        share = share_held(held.share) or "only other code knows how much"
        model.add(f"in {mode}", held.why_not or share + (", with quant.allow_partial" if held.partial else ""))
    parts = [model]
    for title, reasons in (("Training", found.train), ("Exports", found.exports), ("Calibration", found.calibrate)):
        parts.append(Facts(title))
        add_reasons(parts[-1], reasons)
    return spaced(*parts)
