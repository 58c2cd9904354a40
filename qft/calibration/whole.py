"""A model quantized all at once, by an engine that takes no single blocks, and what it does to held-out rows.

These engines need memory for the whole model, as their library holds it while it quantizes; the verification holds the
unquantized model and the result at once. What is measured is the result as it loads from its files. There is nothing
between the beginning and the end to resume from.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.calibration.layer_errors import layer_errors
from qft.documents.evaluation import LayerError
from qft.errors import ModelError
from qft.files import atomic_folder, write_json, write_text
from qft.measure.likelihood import Verification, compare
from qft.model.load import load_base
from qft.plan import CalibrationPlan, ModelPlan, plan_folder
from qft.progress import View
from qft.quant.engines.llmcompressor import run_job
from qft.recipe.schema import QuantSection

__all__ = ["WholeModel", "load_result"]


@dataclass
class WholeModel:
    """One calibration of the whole model, in the folder `work`.

    `unquantized` loads the model that is quantized; where `merged`, its files are not those of plan.checkpoint.
    """

    plan: CalibrationPlan
    work: Path
    view: View
    unquantized: Callable[[], PreTrainedModel]
    merged: bool
    quantized_layers: list[str] = field(default_factory=list)
    """Names of the linear layers that the result holds quantized; known once quantize() is done."""
    skipped_layers: list[str] = field(default_factory=list)
    """Of all other linear layers."""
    block_seconds: list[float] = field(default_factory=list)
    """Stays empty: there are no blocks."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that an engine in an environment of its own has used."""
    peak_bytes: int = 0
    """Largest memory of such an engine's process: of its GPU, or of the host beyond what its imports took."""
    peak_host_bytes: int = 0
    """Largest resident set of such an engine's process."""

    def __post_init__(self) -> None:
        self.rows = list(self.plan.data.verify)
        self._errors: list[LayerError] = []

    def quantize(self) -> Verification:
        """Make the result, load it from its files, and compare it with the unquantized model.

        Raises ModelError if the engine fails, or if what it wrote does not load."""
        with atomic_folder(self._result) as folder:
            if self.plan.calibrate.engine == "custom":
                self._by_plugin(folder)
            else:
                self._by_llmcompressor(folder)
            self.plan.model.tokenizer.save_pretrained(folder)
        gc.collect()  # models refer to themselves
        self.view.note(f"Comparing the result with the unquantized model on {len(self.rows)} rows")
        before, after = self.unquantized().eval(), load_result(self.plan, self._result).eval()
        self._note_layers(before, after)
        found = compare((row["labels"] for row in self.rows), self._logits(before), self._logits(after))
        self._errors = self._layer_errors(before, after)
        return found

    def errors(self) -> list[LayerError]:
        """Of every quantized layer, on the verification rows."""
        return self._errors

    def weight_bytes(self, attempt: int) -> int:
        """Of the result's files of weights."""
        return sum(path.stat().st_size for path in self._result.glob("*.safetensors"))

    def assemble(self, folder: Path, schemes: object, attempt: int) -> None:
        """Copy the result's weights and configuration. There is one attempt, and it is as the recipe says."""
        # copyfile: some libraries write files that their owner alone may read.
        shutil.copytree(self._result, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)

    def tokens_per_second(self) -> float:
        """0: how long the engine was busy with tokens is not told apart from the rest."""
        return 0.0

    @cached_property
    def _stored(self) -> dict[str, int]:
        """Bytes of each tensor of the result, by its name."""
        return _stored_bytes(self._result)

    @property
    def _result(self) -> Path:
        return self.work / "quantized"

    def _by_plugin(self, folder: Path) -> None:
        plan = self._plugin_plan()
        assert plan.plugin is not None
        self.view.note(f"Quantizing the whole model by {plan.plugin.path}")
        model = load_base(plan)
        try:
            model.save_pretrained(folder)
        except Exception as error:  # code of the user's fails in any way
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            text = f"quant.plugin: {plan.plugin.path}: the model that it quantized cannot be saved: {told}"
            raise ModelError(text) from error

    def _by_llmcompressor(self, folder: Path) -> None:
        plan, calibrate = self.plan, self.plan.calibrate
        source, windows = self._unquantized_folder(), self.work / "windows.jsonl"
        write_text(windows, plan.data.as_jsonl())
        job = {
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
        self.view.note(f"Quantizing the whole model by {calibrate.algorithm} of {calibrate.engine_python}")
        on_gpu = plan.model.device.kind == "cuda"
        done = run_job(calibrate.engine_python, job, self.work, self.view.note, on_gpu=on_gpu)
        self.peak_bytes, self.peak_host_bytes = done["peak_bytes"], done["peak_host_bytes"]
        self.versions = {
            name if name == "llmcompressor" else f"llmcompressor's {name}": version
            for name, version in done["versions"].items()
        }
        if not calibrate.symmetric:
            _let_transformers_unpack(folder)

    def _plugin_plan(self) -> ModelPlan:
        """How the plugin loads the model, from the merged weights if there are any."""
        assert self.plan.quantized is not None
        if not self.merged:
            return self.plan.quantized
        folder = self._unquantized_folder()
        checkpoint = dataclasses.replace(self.plan.model.checkpoint, folder=folder, gguf_file=None, hub_id=None)
        return dataclasses.replace(self.plan.quantized, checkpoint=checkpoint)

    def _unquantized_folder(self) -> Path:
        """Where the unquantized model lies as safetensors, with its tokenizer: written here if it does nowhere else."""
        if not self.merged and not self.plan.model.checkpoint.gguf_file:
            return self.plan.model.checkpoint.folder
        with atomic_folder(self.work / "unquantized") as folder:
            self.unquantized().save_pretrained(folder)
            self.plan.model.tokenizer.save_pretrained(folder)
        gc.collect()
        return self.work / "unquantized"

    def _note_layers(self, before: nn.Module, after: nn.Module) -> None:
        held = dict(after.named_modules())
        for name, module in before.named_modules():
            if isinstance(module, nn.Linear):
                is_quantized = hasattr(held.get(name), "dequantize") or f"{name}.weight_scale" in self._stored
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
        sizes = self._stored
        return [
            error.model_copy(update={"bytes": sum(n for name, n in sizes.items() if name.startswith(f"{error.name}."))})
            for error in errors
            if error.name in self.quantized_layers
        ]


def load_result(plan: CalibrationPlan, folder: Path) -> PreTrainedModel:
    """The quantized model in `folder`, loaded as anybody would. Raises ModelError if it says of no quantization."""
    plugin = plan.quantized.plugin if plan.quantized else None
    quant = QuantSection(mode="custom", plugin=plugin.path) if plugin else None
    found = plan_folder(folder, plan.recipe.model, plan.model.dtype, quant)
    if not found.checkpoint.quantization:
        raise ModelError(f"{folder}: its config.json has no quantization_config, so nobody could load it")
    return load_base(found)


def _let_transformers_unpack(folder: Path) -> None:
    """See CompressedTensors.config of qft.engines, which says the same of models with zero points."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["dequantize"] = True
    write_json(folder / "config.json", config)


def _ids(row: dict[str, Sequence[int]], model: Any) -> torch.Tensor:
    return torch.tensor([list(row["input_ids"])], device=model.device)


def _stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor in the safetensors files, by its name."""
    found: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items()}
    return found
