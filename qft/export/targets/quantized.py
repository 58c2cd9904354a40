"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
and compressed-tensors. What that costs is measured against the merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.calibration.accept import quantize_folder
from qft.errors import RecipeError
from qft.export.base import Exporter, Job, Limits, Packages
from qft.export.targets import merged
from qft.plan import plan_calibration, plan_folder
from qft.recipe.catalogue import block_engines
from qft.recipe.schema import CalibrateSection

__all__ = ["BNB_4BIT", "BNB_8BIT", "COMPRESSED", "compressed_section"]

Facts = dict[str, Any]
ROUND = CalibrateSection(engine="rtn")
NF4 = CalibrateSection(engine="bitsandbytes", data_type="nf4")
INT8 = CalibrateSection(engine="bitsandbytes", bits=8, activations="dynamic")


def _writer(section: Callable[[Job], CalibrateSection]) -> Callable[[Job, Path], Facts]:
    def write(job: Job, folder: Path) -> Facts:
        """Raises GateError if calibrate.accept is not met, and what `plan_calibration` raises."""
        model = plan_folder(merged.merged_folder(job), job.plan.recipe.model, job.dtype)
        plan = plan_calibration(job.loaded.having(calibrate=section(job)), model)
        with TemporaryDirectory(dir=job.scratch) as work:
            return quantize_folder(plan, folder, Path(work), job.view)

    return write


def _needed_bytes(job: Job) -> int:
    """The merged model, and twice what is made of it: its blocks and the result, at no more than a byte a weight."""
    return 2 * merged.needed_bytes(job)


def compressed_section(job: Job) -> CalibrateSection:
    """How the target compressed-tensors quantizes. Raises RecipeError for an engine that writes another format."""
    section = job.loaded.recipe.calibrate or ROUND
    able = [*block_engines("compressed-tensors")]
    if section.engine not in able:
        text = f"{section.engine} writes its own format, not compressed-tensors: use {' or '.join(able)}"
        raise RecipeError(job.loaded.problem("calibrate.engine", text))
    return section


def _exporter(
    section: Callable[[Job], CalibrateSection],
    limits: Limits,
    original: Limits,
    usage: str,
    *,
    regrids: bool = False,
    needs: Packages = (),
) -> Exporter:
    return Exporter(
        write=_writer(section),
        needed_bytes=_needed_bytes,
        load=merged.load,
        engine="transformers",
        merges=True,
        regrids=regrids,
        limits=limits,
        limits_original=original,
        library="transformers",
        usage=f"{merged.USAGE}\n{usage}",
        needs=needs,
    )


FOUR_BITS = Limits(kl=0.1, top1_agreement=0.85, perplexity_increase=0.1)
FOUR_BITS_ORIGINAL = Limits(kl=0.3, top1_agreement=0.8, perplexity_increase=0.15)
EIGHT_BITS = Limits(kl=0.02, top1_agreement=0.95, perplexity_increase=0.02)
EIGHT_BITS_ORIGINAL = Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05)

BITSANDBYTES = "transformers needs the package bitsandbytes for it."
BNB_4BIT = _exporter(lambda _: NF4, FOUR_BITS, FOUR_BITS_ORIGINAL, BITSANDBYTES, regrids=True)
BNB_8BIT = _exporter(lambda _: INT8, EIGHT_BITS, EIGHT_BITS_ORIGINAL, BITSANDBYTES)
COMPRESSED = _exporter(
    compressed_section,
    FOUR_BITS,
    FOUR_BITS_ORIGINAL,
    "transformers needs the package compressed-tensors for it.",
    needs=(("compressed_tensors", "calibrate"),),
)
