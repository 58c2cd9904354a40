"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
and compressed-tensors. What that costs is measured against the merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.commands.calibrate import calibrate
from qft.errors import RecipeError
from qft.export.base import Exporter, Job, Limits, Packages
from qft.export.targets import merged
from qft.recipe import LoadedRecipe
from qft.recipe.schema import AdapterSection, CalibrateSection, EvalSection, QuantSection

__all__ = ["BNB_4BIT", "BNB_8BIT", "COMPRESSED", "compressed_section"]

Facts = dict[str, Any]
ROUND = CalibrateSection(engine="rtn")
NF4 = CalibrateSection(engine="bitsandbytes", data_type="nf4")
INT8 = CalibrateSection(engine="bitsandbytes", bits=8, activations="dynamic")


def _writer(section: Callable[[Job], CalibrateSection]) -> Callable[[Job, Path], Facts]:
    def write(job: Job, folder: Path) -> Facts:
        """Raises GateError if calibrate.accept is not met, and what `calibrate` raises."""
        whole = merged.merged_folder(job)
        with TemporaryDirectory(dir=job.scratch) as work:
            report = calibrate(_recipe(job, section(job), whole, Path(work) / "quantized"), job.view)
            assert report.result is not None
            for path in Path(report.result).iterdir():
                if path.name != "calibration.json":  # it tells of the merged folder, which is gone
                    shutil.move(path, folder / path.name)
                    (folder / path.name).chmod(0o644)
        last = report.attempts[-1]
        return {
            "engine": report.engine,
            "scheme": report.scheme,
            "kl": last.kl_mean,
            "top1_agreement": last.top1_agreement,
            "perplexity_change": last.perplexity_change.value,
            "layers_in_more_bits": last.kept,
        }

    return write


def _recipe(job: Job, section: CalibrateSection, whole: Path, out: Path) -> LoadedRecipe:
    """The run's recipe as one that calibrates the merged model."""
    model = {"path": str(whole.resolve()), "revision": None, "dtype": job.dtype}
    own = {"model": model, "calibrate": section, "output_dir": str(out.resolve())}
    quiet = {} if section.accept.score_drop is not None else {"eval": EvalSection()}
    return job.loaded.having(**own, **quiet, quant=QuantSection(), adapter=AdapterSection())


def _needed_bytes(job: Job) -> int:
    """The merged model, and twice what is made of it: its blocks and the result, at no more than a byte a weight."""
    return 2 * merged.needed_bytes(job)


def compressed_section(job: Job) -> CalibrateSection:
    """How the target compressed-tensors quantizes. Raises RecipeError for an engine that writes another format."""
    section = job.loaded.recipe.calibrate or ROUND
    if section.engine not in ("autoround", "rtn"):
        text = f"{section.engine} writes its own format, not compressed-tensors: use autoround or rtn"
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
