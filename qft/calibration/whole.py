"""A model quantized all at once, by an engine that takes no single blocks, and what it does to held-out rows.

These engines need memory for the whole model, as their library holds it while it quantizes; the verification holds the
unquantized model and the result at once. What is measured is the result as it loads from its files. There is nothing
between the beginning and the end to resume from.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.calibration.layer_errors import layer_errors
from qft.calibration.quantizer import EngineProcess, Trial
from qft.calibration.source import Source
from qft.calibration.whole_engines import WHOLE_ENGINES
from qft.documents.evaluation import LayerError
from qft.errors import ModelError
from qft.files import atomic_folder
from qft.measure.likelihood import Verification, compare
from qft.model.load import load_base
from qft.plan import CalibrationPlan, plan_folder
from qft.progress import View
from qft.recipe.training import QuantSection

__all__ = ["WholeQuantizer", "load_result"]


@dataclass
class WholeQuantizer:
    """One calibration of the whole model, in the folder source.work."""

    plan: CalibrationPlan
    source: Source
    view: View
    quantized_layers: list[str] = field(default_factory=list)
    """Names of the linear layers that the result holds quantized; known once quantize() is done."""
    skipped_layers: list[str] = field(default_factory=list)
    """Of all other linear layers."""
    block_seconds: list[float] = field(default_factory=list)
    """Stays empty: there are no blocks."""
    process: EngineProcess = field(default_factory=EngineProcess)

    def __post_init__(self) -> None:
        self.plan.model.checkpoint.with_weights()
        self.rows = list(self.plan.data.verify)
        self._errors: list[LayerError] = []

    def trials(self) -> Iterator[Trial]:
        """One: single layers are not held otherwise here."""
        verification = self.quantize()
        weight_bytes = sum(path.stat().st_size for path in self._result.glob("*.safetensors"))
        yield Trial(0, self.plan.schemes, verification, weight_bytes)

    def quantize(self) -> Verification:
        """Make the result, load it from its files, and compare it with the unquantized model.

        Raises ModelError if the engine fails, or if what it wrote does not load."""
        with atomic_folder(self._result) as folder:
            self.process = WHOLE_ENGINES[self.plan.calibrate.engine](self.plan, self.source, self.view, folder)
            self.plan.model.tokenizer.save_pretrained(folder)
        gc.collect()  # models refer to themselves
        self.view.note(f"Comparing the result with the unquantized model on {len(self.rows)} rows")
        before, after = self.source.load().eval(), load_result(self.plan, self._result).eval()
        self._note_layers(before, after)
        found = compare((row["labels"] for row in self.rows), self._logits(before), self._logits(after))
        self._errors = self._layer_errors(before, after)
        return found

    def errors(self) -> list[LayerError]:
        """Of every quantized layer, on the verification rows."""
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
        held, sizes = (error for error in errors if error.name in self.quantized_layers), self._stored.items()
        own = ((error, sum(size for name, size in sizes if name.startswith(f"{error.name}."))) for error in held)
        return [error.model_copy(update={"bytes": size}) for error, size in own]


def load_result(plan: CalibrationPlan, folder: Path) -> PreTrainedModel:
    """The quantized model in `folder`, loaded as anybody would. Raises ModelError if it says of no quantization."""
    plugin = plan.quantized.scheme.plugin if plan.quantized else None
    quant = QuantSection(mode="custom", plugin=plugin.path) if plugin else None
    found = plan_folder(folder, plan.model.recipe.model, plan.model.dtype, quant)
    if not found.checkpoint.quantization:
        raise ModelError(f"{folder}: its config.json has no quantization_config, so nobody could load it")
    return load_base(found)


def _ids(row: dict[str, Sequence[int]], model: Any) -> torch.Tensor:
    return torch.tensor([list(row["input_ids"])], device=model.device)
