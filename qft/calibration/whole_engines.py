"""Engines that quantize a model all at once: each writes one folder, and says what its own process took."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from qft.calibration.quantizer import EngineProcess
from qft.calibration.source import Source
from qft.errors import ModelError
from qft.files import write_json, write_text
from qft.model.load import load_base
from qft.plan import CalibrationPlan, ModelPlan
from qft.progress import View
from qft.quant.engines.llmcompressor import run_job

__all__ = ["WHOLE_ENGINES"]


def write_by_plugin(plan: CalibrationPlan, source: Source, view: View, folder: Path) -> EngineProcess:
    """By the code of quant.plugin, as transformers loads and saves. Raises ModelError if that fails."""
    assert plan.quantized is not None
    quantized = _on_merged(plan.quantized, source) if source.run else plan.quantized
    plugin = quantized.scheme.plugin
    assert plugin is not None
    view.note(f"Quantizing the whole model by {plugin.path}")
    model = load_base(quantized)
    try:
        model.save_pretrained(folder)
    except Exception as error:  # code of the user's fails in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"quant.plugin: {plugin.path}: the model that it quantized cannot be saved: {reason}"
        raise ModelError(text) from error
    return EngineProcess()


def _on_merged(plan: ModelPlan, source: Source) -> ModelPlan:
    """The plan of a model that is loaded from the merged weights."""
    checkpoint = dataclasses.replace(source.plan.checkpoint, folder=source.folder(), gguf_file=None, hub_id=None)
    return dataclasses.replace(plan, checkpoint=checkpoint)


def write_by_llmcompressor(plan: CalibrationPlan, source: Source, view: View, folder: Path) -> EngineProcess:
    """By an algorithm of llm-compressor, in a process of calibrate.engine_python. Raises ModelError if it fails."""
    calibrate, windows = plan.calibrate, source.work / "windows.jsonl"
    write_text(windows, plan.data.as_jsonl())
    asked = {
        "model": str(source.folder()),
        "dtype": plan.model.dtype,
        "trust_remote_code": plan.recipe.model.trust_remote_code,
        "windows": str(windows),
        "algorithm": calibrate.algorithm,
        "scheme": next(scheme for scheme in plan.schemes.values() if scheme).facts(),
        "ignore": [name for name, scheme in plan.schemes.items() if scheme is None],
        "seed": plan.seed,
        "output": str(folder),
    }
    assert calibrate.engine_python is not None
    view.note(f"Quantizing the whole model by {calibrate.algorithm} of {calibrate.engine_python}")
    on_gpu = plan.model.device.kind == "cuda"
    report = run_job(calibrate.engine_python, asked, source.work, view.note, on_gpu=on_gpu)
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


WHOLE_ENGINES: dict[str, Callable[[CalibrationPlan, Source, View, Path], EngineProcess]] = {
    "custom": write_by_plugin,
    "llmcompressor": write_by_llmcompressor,
}
"""By calibrate.engine."""
