"""What several GPUs would take of a training, as a rich table."""

from rich.console import Group

from qft.documents.placement import PlannedGpus
from qft.views.terminal.table import Rows, bullets
from qft.views.words import size


def render_gpus(gpus: PlannedGpus) -> Group:
    """The ways that there are beside each other, by arithmetic, and why others are none."""
    nodes = f"{gpus.nodes} nodes of " if gpus.nodes > 1 else ""
    title = f"On {nodes}{gpus.gpus} GPUs, of which {size(gpus.budget_bytes)} of {size(gpus.device_bytes)} may be taken"
    ways = [way for way in gpus.placements if not way.cannot]
    table = Rows(title, "", *(f"{way.strategy}{' *' * (way.strategy == gpus.chosen)}" for way in ways))
    table.add("fits", *({True: "yes", False: "NO", None: "unknown"}[way.fits] for way in ways))
    for name, field in (
        ("a GPU, loading", "load_bytes"),
        ("a GPU, steps' peak", "peak_bytes"),
        ("host of a node", "host_bytes"),
        ("gathered a micro-batch", "gathered_bytes"),
        ("reduced an update", "reduced_bytes"),
    ):
        sizes = (getattr(way, field) for way in ways)
        table.add(name, *("unknown" if each is None else size(each) for each in sizes))
    table.add("an update, of each GPU", *(f"{way.accumulated} of {way.rows} rows" for way in ways))
    table.add("updates", *(str(way.steps) for way in ways))
    others = [f"{way.strategy} cannot be: {way.cannot}" for way in gpus.placements if way.cannot]
    return Group(table, *bullets(others, "yellow"))
