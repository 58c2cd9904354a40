"""Engines that quantize a model all at once: each writes one folder, and says what its own process took."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qft.calibration.quantizer import EngineProcess
from qft.calibration.source import Source
from qft.errors import ModelError
from qft.files import write_json, write_text
from qft.model.load import load_base
from qft.plan import CalibrationPlan, ModelPlan
from qft.progress import View
from qft.quant.engines.llmcompressor import run_job

__all__ = ["WHOLE_ENGINES", "WholeJob"]


@dataclass(frozen=True)
class WholeJob:
    """One model to quantize."""

    plan: CalibrationPlan
    source: Source
    work: Path
    """A folder for what is made on the way."""
    view: View


def write_by_plugin(job: WholeJob, folder: Path) -> EngineProcess:
    """By the code of quant.plugin, as transformers loads and saves. Raises ModelError if that fails."""
    plan = _plugin_plan(job)
    assert plan.plugin is not None
    job.view.note(f"Quantizing the whole model by {plan.plugin.path}")
    model = load_base(plan)
    try:
        model.save_pretrained(folder)
    except Exception as error:  # code of the user's fails in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"quant.plugin: {plan.plugin.path}: the model that it quantized cannot be saved: {reason}"
        raise ModelError(text) from error
    return EngineProcess()


def _plugin_plan(job: WholeJob) -> ModelPlan:
    """How the plugin loads the model, from the merged weights if there are any."""
    assert job.plan.quantized is not None
    if not job.source.run:
        return job.plan.quantized
    folder = job.source.folder()
    checkpoint = dataclasses.replace(job.plan.model.checkpoint, folder=folder, gguf_file=None, hub_id=None)
    return dataclasses.replace(job.plan.quantized, checkpoint=checkpoint)


def write_by_llmcompressor(job: WholeJob, folder: Path) -> EngineProcess:
    """By an algorithm of llm-compressor, in a process of calibrate.engine_python. Raises ModelError if it fails."""
    plan, calibrate = job.plan, job.plan.calibrate
    source, windows = job.source.folder(), job.work / "windows.jsonl"
    write_text(windows, plan.data.as_jsonl())
    asked = {
        "model": str(source),
        "dtype": plan.model.dtype,
        "trust_remote_code": plan.recipe.model.trust_remote_code,
        "windows": str(windows),
        "algorithm": calibrate.algorithm,
        "scheme": dataclasses.asdict(next(scheme for scheme in plan.schemes.values() if scheme)),
        "ignore": [name for name, scheme in plan.schemes.items() if scheme is None],
        "seed": plan.seed,
        "output": str(folder),
    }
    assert calibrate.engine_python is not None
    job.view.note(f"Quantizing the whole model by {calibrate.algorithm} of {calibrate.engine_python}")
    on_gpu = plan.model.device.kind == "cuda"
    report = run_job(calibrate.engine_python, asked, job.work, job.view.note, on_gpu=on_gpu)
    if not calibrate.symmetric:
        _let_transformers_unpack(folder)
    versions = {
        name if name == "llmcompressor" else f"llmcompressor's {name}": version
        for name, version in report["versions"].items()
    }
    return EngineProcess(versions, report["peak_bytes"], report["peak_host_bytes"])


def _let_transformers_unpack(folder: Path) -> None:
    """See CompressedTensors.config of qft.quant.engines, which says the same of models with zero points."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["dequantize"] = True
    write_json(folder / "config.json", config)


WHOLE_ENGINES: dict[str, Callable[[WholeJob, Path], EngineProcess]] = {
    "custom": write_by_plugin,
    "llmcompressor": write_by_llmcompressor,
}
"""By calibrate.engine."""
