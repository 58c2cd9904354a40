"""A model quantized all at once, by an engine that takes no single blocks, and what it does to held-out rows.

These engines need memory for the whole model, as their library holds it while it quantizes; the verification holds the
unquantized model and the result at once. What is measured is the result as it loads from its files. There is nothing
between the beginning and the end to resume from.
"""

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.calibration.finite import require_finite
from qft.calibration.layer_errors import layer_errors
from qft.calibration.quantizer import EngineProcess, Trial
from qft.calibration.source import Source
from qft.disk import disk_failures
from qft.documents.evaluation import LayerError
from qft.errors import ModelError, QftError
from qft.files import atomic_folder, write_json, write_text
from qft.measure.likelihood import Verification, compare
from qft.model.load import load_base
from qft.plan import CalibrationPlan, ModelPlan, plan_folder
from qft.progress import View
from qft.quant.engines.llmcompressor import run_job
from qft.recipe.training import QuantSection


@dataclass
class WholeQuantizer:
    """One calibration of the whole model, in the folder source.work."""

    plan: CalibrationPlan
    source: Source
    view: View
    quantized_layers: list[str] = field(default_factory=list)
    skipped_layers: list[str] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)
    process: EngineProcess = field(default_factory=EngineProcess)

    def __post_init__(self) -> None:
        self.plan.model.checkpoint.with_weights()
        self.rows = list(self.plan.data.verify)
        self._errors: list[LayerError] = []

    @property
    def unreached(self) -> list[str]:
        return []

    def trials(self) -> Iterator[Trial]:
        """One: single layers are not held otherwise here."""
        verification = self.quantize()
        weight_bytes = sum(path.stat().st_size for path in self._result.glob("*.safetensors"))
        yield Trial(0, self.plan.schemes, verification, weight_bytes)

    def quantize(self) -> Verification:
        """Make the result, load it from its files, and compare it with the unquantized model. Raises ModelError if the
        engine fails, or if what it wrote does not load."""
        with atomic_folder(self._result) as folder:
            self.process = WHOLE_ENGINES[self.plan.calibrate.engine](self, folder)
            self.plan.model.checkpoint.save_reader(self.plan.model.tokenizer, folder)
        gc.collect()  # models refer to themselves
        self.view.note(f"Comparing the result with the unquantized model on {len(self.rows)} rows")
        before, after = self.source.load().eval(), load_result(self.plan, self._result).eval()
        self._note_layers(before, after)
        verification = compare((row["labels"] for row in self.rows), self._logits(before), self._logits(after))
        require_finite(verification, self.rows, self.plan.data.prepared.place)
        self._errors = self._layer_errors(before, after)
        return verification

    def errors(self) -> list[LayerError]:
        return self._errors

    def assemble(self, folder: Path, trial: Trial) -> None:
        """Copy the result's weights and configuration."""
        # copyfile: some libraries write files that their owner alone may read.
        shutil.copytree(self._result, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)

    @cached_property
    def _stored(self) -> dict[str, int]:
        """Bytes of each tensor of the result, by its name."""
        found: dict[str, int] = {}
        for path in self._result.glob("*.safetensors"):
            with path.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            header.pop("__metadata__", None)
            found |= {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items()}
        return found

    @property
    def _result(self) -> Path:
        return self.source.work / "quantized"

    def _note_layers(self, before: nn.Module, after: nn.Module) -> None:
        layers_after = dict(after.named_modules())
        for name, module in before.named_modules():
            if isinstance(module, nn.Linear):
                is_quantized = hasattr(layers_after.get(name), "dequantize") or f"{name}.weight_scale" in self._stored
                (self.quantized_layers if is_quantized else self.skipped_layers).append(name)

    def _logits(self, model: Any) -> Any:
        """Of one row after the other, [tokens, vocabulary]."""
        for row in self.rows:
            with torch.inference_mode():
                yield model(input_ids=_ids(row, model), use_cache=False).logits[0]

    def _layer_errors(self, before: PreTrainedModel, after: PreTrainedModel) -> list[LayerError]:
        if self.plan.algorithm in ("awq", "smoothquant"):
            return []  # they scale a layer's inputs and weights against each other
        ids = [_ids(row, before) for row in self.rows]
        errors = layer_errors(before, after, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids])
        held, sizes = (error for error in errors if error.name in self.quantized_layers), self._stored.items()
        own = ((error, sum(size for name, size in sizes if name.startswith(f"{error.name}."))) for error in held)
        return [error.model_copy(update={"bytes": size}) for error, size in own]


def load_result(plan: CalibrationPlan, folder: Path) -> PreTrainedModel:
    """The quantized model in `folder`, loaded as anybody would. Raises ModelError if it says of no quantization."""
    plugin = plan.quantized.scheme.plugin if plan.quantized else None
    quant = QuantSection(mode="custom", plugin=plugin.path) if plugin else None
    result = plan_folder(folder, plan.model.recipe.model, plan.model.dtype, quant)
    if not result.checkpoint.quantization:
        raise ModelError(f"{folder}: its config.json has no quantization_config, so nobody could load it")
    return load_base(result)


def _ids(row: dict[str, Sequence[int]], model: Any) -> torch.Tensor:
    return torch.tensor([list(row["input_ids"])], device=model.device)


def write_by_plugin(job: WholeQuantizer, folder: Path) -> EngineProcess:
    """By the code of quant.plugin, as transformers loads and saves. Raises ModelError if that fails."""
    plan = _plugin_plan(job)
    plugin = plan.scheme.plugin
    assert plugin is not None
    job.view.note(f"Quantizing the whole model by {plugin.path}")
    model = load_base(plan)
    try:
        with disk_failures(folder):
            model.save_pretrained(folder)
    except QftError:
        raise
    except Exception as error:  # code of the user's fails in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"quant.plugin: {plugin.path}: the model that it quantized cannot be saved: {reason}"
        raise ModelError(text) from error
    return EngineProcess()


def _plugin_plan(job: WholeQuantizer) -> ModelPlan:
    """How the plugin loads the model, from the merged weights if there are any."""
    assert job.plan.quantized is not None
    if not job.source.run:
        return job.plan.quantized
    checkpoint = job.plan.model.checkpoint.written_to(job.source.folder())
    return dataclasses.replace(job.plan.quantized, checkpoint=checkpoint)


def write_by_llmcompressor(job: WholeQuantizer, folder: Path) -> EngineProcess:
    """By an algorithm of llm-compressor, in a process of calibrate.engine_python. Raises ModelError if it fails."""
    plan, calibrate = job.plan, job.plan.calibrate
    source, scratch = job.source.folder(), job.source.work / "engine"
    scratch.mkdir(parents=True, exist_ok=True)  # what it leaves in the folder that it runs in is nobody's
    windows = scratch / "windows.jsonl"
    write_text(windows, plan.data.as_jsonl())
    request = {
        "model": str(source.resolve()),  # it runs elsewhere
        "dtype": plan.model.dtype,
        "trust_remote_code": plan.recipe.model.trust_remote_code,
        "windows": str(windows.resolve()),
        "algorithm": calibrate.algorithm,
        "scheme": next(scheme for scheme in plan.schemes.values() if scheme).facts(),
        "ignore": [name for name, scheme in plan.schemes.items() if scheme is None],
        "seed": plan.seed,
        "output": str(folder.resolve()),
    }
    assert calibrate.engine_python is not None
    job.view.note(f"Quantizing the whole model by {calibrate.algorithm} of {calibrate.engine_python}")
    on_gpu = plan.model.device.kind == "cuda"
    report = run_job(calibrate.engine_python, request, scratch, job.view.note, on_gpu=on_gpu)
    if not calibrate.symmetric:
        # See CompressedTensors.config of qft.quant.engines, which says the same of models with zero points.
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["quantization_config"]["dequantize"] = True
        write_json(folder / "config.json", config)
    own = "llmcompressor"
    versions = {name if name == own else f"{own}'s {name}": version for name, version in report["versions"].items()}
    return EngineProcess(versions, report["peak_bytes"], report["peak_host_bytes"])


WHOLE_ENGINES: dict[str, Callable[[WholeQuantizer, Path], EngineProcess]] = {
    "custom": write_by_plugin,
    "llmcompressor": write_by_llmcompressor,
}
"""By calibrate.engine."""
