"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
and compressed-tensors. What that costs is measured against the merged model."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.calibration.accept import quantize_folder
from qft.errors import RecipeError
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits
from qft.export.targets.merged import Merged, merged_folder
from qft.plan import plan_calibration, plan_folder
from qft.recipe.catalogue import export_problem
from qft.recipe.schema import CalibrateSection


class Quantized(Exporter):
    """What the forms have in common."""

    rounding = CalibrateSection(engine="rtn")
    """How it quantizes."""

    def section(self, job: Job) -> CalibrateSection:
        return self.rounding

    def needed_bytes(self, job: Job) -> int:
        """The merged model, and twice what is made of it, blocks and result, at no more than a byte a weight."""
        return 2 * job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Raises GateError if calibrate.accept is not met, and what `plan_calibration` raises."""
        recipe = job.loaded.recipe
        model = plan_folder(merged_folder(job), job.plan.recipe.model, job.dtype)
        allowed = any(part.allow_partial for part in (recipe.quant, recipe.calibrate) if part)
        section = self.section(job).having(allow_partial=allowed)
        plan = plan_calibration(job.loaded.having(calibrate=section), model)
        with TemporaryDirectory(dir=job.scratch) as work:
            return quantize_folder(plan, folder, Path(work), job.view)


class Bnb4Bit(Quantized):
    format = "bnb-4bit"
    limits = Limits(kl=0.1, top1_agreement=0.85, perplexity_increase=0.1)
    limits_original = Limits(kl=0.3, top1_agreement=0.8, perplexity_increase=0.15)
    regrids = True
    usage = f"{Merged.usage}\ntransformers needs the package bitsandbytes for it."
    rounding = CalibrateSection(engine="bitsandbytes", data_type="nf4")


class Bnb8Bit(Quantized):
    format = "bnb-8bit"
    limits = Limits(kl=0.02, top1_agreement=0.95, perplexity_increase=0.02)
    limits_original = Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05)
    usage = Bnb4Bit.usage
    rounding = CalibrateSection(engine="bitsandbytes", bits=8, activations="dynamic")


class CompressedTensors(Quantized):
    format = "compressed-tensors"
    limits, limits_original = Bnb4Bit.limits, Bnb4Bit.limits_original
    needs = (("compressed_tensors", "calibrate"),)
    usage = f"{Merged.usage}\ntransformers needs the package compressed-tensors for it."

    def weight_format(self, job: Job) -> str:
        section = self.section(job)
        kind = f"W{section.bits}A16{'' if section.symmetric else ' with zero points'}"
        if section.activations != "none":
            kind = f"{'FP8' if section.data_type == 'float' else 'W8A8'} {section.activations}"
        return f"{self.format} {kind}"

    def section(self, job: Job) -> CalibrateSection:
        """As the recipe calibrates. Raises RecipeError for an engine that cannot."""
        section = job.loaded.recipe.calibrate or self.rounding
        if problem := export_problem(section.engine, self.format):
            raise RecipeError(job.loaded.problem("calibrate.engine", problem))
        return section
