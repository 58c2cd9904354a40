"""Forms that are merged first and then quantized again by the machinery of `qft calibrate`: bitsandbytes' 4 and 8 bits,
compressed-tensors and torchao. What that costs is measured against the merged model."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.calibration.accept import quantize_folder
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits
from qft.export.targets.merged import Merged, merged_folder
from qft.model.handover import FORMS
from qft.plan import plan_calibration, plan_folder
from qft.quant.hold import Qat
from qft.recipe.loads import compressed


class Quantized(Exporter):
    """What the forms have in common."""

    def needed_bytes(self, job: Job) -> int:
        """The merged model, and twice what is made of it, blocks and result, at no more than a byte a weight."""
        return 2 * job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> dict[str, Any] | None:
        """Says nothing of a run that was trained rounded: it is quantized once, and loses nothing. Raises GateError if
        calibrate.accept is not met, and what `plan_calibration` raises."""
        model = plan_folder(merged_folder(job), job.plan.recipe.model, job.dtype)
        asked = job.loaded.having(calibrate=job.section(FORMS[self.format]))
        plan = plan_calibration(asked, model, settled=job.learnt)
        with TemporaryDirectory(dir=job.scratch) as work:
            told = quantize_folder(plan, folder, Path(work), job.view)
        return None if isinstance(job.plan.scheme, Qat) else told


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
