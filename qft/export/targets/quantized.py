"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
compressed-tensors and torchao. What that costs is measured against the merged model."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.calibration.accept import quantize_folder
from qft.errors import QftError, first_line
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits
from qft.export.targets.merged import Merged, merged_folder
from qft.model.handover import FORMS
from qft.plan import ModelPlan, plan_calibration, plan_folder
from qft.quant.hold import Qat
from qft.recipe.loads import compressed
from qft.recipe.schema import CalibrateSection


class Quantized(Exporter):
    """What the forms have in common."""

    def needed_bytes(self, job: Job) -> int:
        """The merged model, and twice what is made of it, blocks and result, at no more than a byte a weight."""
        return 2 * job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> dict[str, Any] | None:
        """Says nothing of a run that was trained rounded: it is quantized once, and loses nothing. Raises GateError if
        calibrate.accept is not met, and what `plan_calibration` raises."""
        form, model = FORMS[self.format], plan_folder(merged_folder(job), job.plan.recipe.model, job.dtype)
        search = job.search(form)
        told = _searched(job, model, search, folder) if search else {}
        if "engine" not in told:
            told |= _quantized(job, model, job.section(form), folder)
        return None if isinstance(job.plan.scheme, Qat) else told


def _quantized(job: Job, model: ModelPlan, section: CalibrateSection, folder: Path) -> dict[str, Any]:
    plan = plan_calibration(job.loaded.having(calibrate=section), model, settled=job.learnt)
    with TemporaryDirectory(dir=job.scratch) as work:
        return quantize_folder(plan, folder, Path(work), job.view)


def _searched(job: Job, model: ModelPlan, section: CalibrateSection, folder: Path) -> dict[str, Any]:
    """The same, or why there is no result: whatever stops a search, rounding to the nearest may still be done."""
    job.view.note(f"Searching 4-bit weights by {section.engine}, with the run's own rows")
    try:
        return _quantized(job, model, section, folder)
    except Exception as error:  # auto-round raises what it likes of a model that it does not know
        why = str(error) if isinstance(error, QftError) else f"{type(error).__name__}: {first_line(error)}"
    job.view.note(f"Rounding to the nearest, since {section.engine} cannot search here: {why}")
    return {"not_searched": f"{section.engine}: {why}"}


class Bnb4Bit(Quantized):
    format = "bnb-4bit"
    limits = Limits(kl=0.1, top1_agreement=0.85, perplexity_increase=0.1)
    limits_original = Limits(kl=0.3, top1_agreement=0.8, perplexity_increase=0.15)
    usage = f"{Merged.usage}\ntransformers needs the package bitsandbytes for it."


class Bnb8Bit(Quantized):
    format = "bnb-8bit"
    limits = Limits(kl=0.02, top1_agreement=0.95, perplexity_increase=0.02)
    limits_original = Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05)
    usage = Bnb4Bit.usage


class TorchAo(Quantized):
    format = "torchao"
    limits, limits_original = Bnb8Bit.limits, Bnb8Bit.limits_original
    usage = f"{Merged.usage}\ntransformers needs the package torchao for it."


class CompressedTensors(Quantized):
    format = "compressed-tensors"
    limits, limits_original = Bnb4Bit.limits, Bnb4Bit.limits_original
    usage = f"{Merged.usage}\ntransformers needs the package compressed-tensors for it."

    def weight_format(self, job: Job) -> str:
        return compressed(job.section(FORMS[self.format]))
