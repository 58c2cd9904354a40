"""Which layers to hold in more bits when a result is not accepted: the worst ones, more of them each time."""

from collections.abc import Iterable, Iterator, Mapping

from qft.calibration.quantizer import Schemes
from qft.documents.evaluation import LayerError
from qft.quant.layer import LayerScheme
from qft.recipe.loads import compressed, why_not

RAISED_BY = "rtn"
"""The engine that holds layers in 8 bits here: they are close enough to need no data, whatever made the others."""

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Layers that inference engines fuse into one, so that they must be held alike."""


def remedies(
    schemes: Schemes,
    errors: Iterable[LayerError],
    weights: Mapping[str, int],
    *,
    used: int,
    limit: int | None,
    serve: str | None = None,
) -> Iterator[Schemes]:
    """The worst layers in 8 bits, then in 16; one more, two more, four more, … as far as `limit` bytes allow. `errors`
    and `weights` (their number) are those of the layers that `schemes` quantizes, `used` the bytes of all weights of
    the model that was not accepted. `serve` is calibrate.serve: what it does not load is left out."""
    size, units = {error.name: error.bytes for error in errors}, _units(errors)
    for raised in _ladder(schemes, serve):
        done = 0
        while done < len(units):
            count, before = done + 1, schemes
            for unit in units[done : done + count]:
                wanted = {name: weights[name] * (raised.bits if raised else 16) // 8 for name in unit}
                more = sum(wanted.values()) - sum(size[name] for name in unit)
                if limit is None or used + more <= limit:
                    schemes = {**schemes, **dict.fromkeys(unit, raised)}
                    size, used = size | wanted, used + more
            done += count
            if schemes != before:
                yield schemes


def _units(errors: Iterable[LayerError]) -> list[list[str]]:
    """Layers that are raised together, those with the noisiest output first."""
    noise: dict[tuple[str, str], list[LayerError]] = {}
    for error in errors:
        owner, _, kind = error.name.rpartition(".")
        fused = next((min(group) for group in SIBLINGS if kind in group), kind)
        noise.setdefault((owner, fused), []).append(error)
    order = sorted(noise.values(), key=lambda errors: min(error.output_snr_db for error in errors))
    return [[error.name for error in errors] for errors in order]


def _ladder(schemes: Schemes, serve: str | None) -> list[LayerScheme | None]:
    """What layers are raised to; None is 16 bits."""
    # compressed-tensors loads packed zero points only where all layers are held alike.
    takes_8 = all(s is None or (s.data_type == "int" and s.bits == 4 and s.symmetric) for s in schemes.values())
    eight = LayerScheme("int", 8)
    return [eight, None] if takes_8 and not why_not(serve, compressed(eight)) else [None]
