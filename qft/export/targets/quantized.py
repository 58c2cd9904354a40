"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
and compressed-tensors. What that costs is measured against the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.commands.calibrate import calibrate
from qft.errors import RecipeError
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits
from qft.export.targets.merged import Merged, load_folder, merged_folder
from qft.recipe import LoadedRecipe
from qft.recipe.schema import AdapterSection, CalibrateSection, EvalSection, QuantSection

__all__ = ["Bnb4Bit", "Bnb8Bit", "CompressedTensors"]


class Quantized(Exporter):
    """What the forms have in common."""

    engine = library = "transformers"
    rounding = CalibrateSection(engine="rtn")
    """How it quantizes."""

    def section(self, job: Job) -> CalibrateSection:
        return self.rounding

    def needed_bytes(self, job: Job) -> int:
        """The merged model, and twice what is made of it, blocks and result, at no more than a byte a weight."""
        return 2 * job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Raises GateError if calibrate.accept is not met, and what `calibrate` raises."""
        whole = merged_folder(job)
        with TemporaryDirectory(dir=job.scratch) as work:
            report = calibrate(_recipe(job, self.section(job), whole, Path(work) / "quantized"), job.view)
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

    def load(self, job: Job, folder: Path) -> Any:
        return load_folder(job, folder)


class Bnb4Bit(Quantized):
    limits = Limits(kl=0.1, top1_agreement=0.85, perplexity_increase=0.1)
    limits_original = Limits(kl=0.3, top1_agreement=0.8, perplexity_increase=0.15)
    regrids = True
    usage = f"{Merged.usage}\ntransformers needs the package bitsandbytes for it."
    rounding = CalibrateSection(engine="bitsandbytes", data_type="nf4")

    def weight_format(self, job: Job) -> str:
        return "bnb-4bit"


class Bnb8Bit(Quantized):
    limits = Limits(kl=0.02, top1_agreement=0.95, perplexity_increase=0.02)
    limits_original = Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05)
    usage = Bnb4Bit.usage
    rounding = CalibrateSection(engine="bitsandbytes", bits=8, activations="dynamic")

    def weight_format(self, job: Job) -> str:
        return "bnb-8bit"


class CompressedTensors(Quantized):
    limits, limits_original = Bnb4Bit.limits, Bnb4Bit.limits_original
    needs = (("compressed_tensors", "calibrate"),)
    usage = f"{Merged.usage}\ntransformers needs the package compressed-tensors for it."

    def weight_format(self, job: Job) -> str:
        section = self.section(job)
        if section.activations == "none":
            kind = f"W{section.bits}A16"
            return f"compressed-tensors {kind if section.symmetric else f'{kind} with zero points'}"
        return f"compressed-tensors {'FP8' if section.data_type == 'float' else 'W8A8'} {section.activations}"

    def section(self, job: Job) -> CalibrateSection:
        """As the recipe calibrates. Raises RecipeError for an engine that writes another format."""
        section = job.loaded.recipe.calibrate or self.rounding
        if section.engine not in ("autoround", "rtn"):
            text = f"{section.engine} writes its own format, not compressed-tensors: use autoround or rtn"
            raise RecipeError(job.loaded.problem("calibrate.engine", text))
        return section


def _recipe(job: Job, section: CalibrateSection, whole: Path, out: Path) -> LoadedRecipe:
    """The run's recipe as one that calibrates the merged model."""
    model = {"path": str(whole.resolve()), "revision": None, "dtype": job.dtype}
    own = {"model": model, "calibrate": section, "output_dir": str(out.resolve())}
    quiet = {} if section.accept.score_drop is not None else {"eval": EvalSection()}
    return job.loaded.having(**own, **quiet, quant=QuantSection(), adapter=AdapterSection())
