"""calibrate.remedy distill: quantized weights that learn the predictions of the unquantized model.

Each layer multiplies with round(W + s B A), on the grid of the scales that the calibration chose, and LoRA learns which
of its points each weight is at (arXiv:2601.20088). Nothing else is changed: the result is written by the same engine,
in the same format and size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_linear_schedule_with_warmup, set_seed

from qft.calibration.quantizer import QuantizeTask
from qft.memory.checkpointing import enable_checkpointing
from qft.memory.distilled_loss import distilled_loss
from qft.progress import View
from qft.quant.engines import Block, Engine, QuantizedLayer, find_engine
from qft.quant.engines.base import Tensors, linear_of
from qft.quant.layer import LayerScheme
from qft.quant.rounded import round_layers, rounded_weight, switch_of
from qft.quant.rounding import TARGETS, Rounding, Scaled

RANK, WINDOWS, WARMUP, NORM = 64, 4, 0.05, 1.0
"""Of the adapters; windows of one update, share of the updates that warm up, and the norm that gradients are cut to."""
PEAK, LOST = 1e-3, 0.3
"""Learning rate where rounding has cost so many nats, or more. The noise of the steps is a KL divergence too, which
grows with the square of the rate and must stay small beside what there is to recover."""


def distill(task: QuantizeTask, held: Mapping[str, Tensors], view: View) -> dict[str, torch.Tensor]:
    """What each quantized layer has learnt, [out, in] on the host, by its name: integers on their grid,
    others as they are before they are rounded. `held` is what was written of it."""
    assert task.load is not None
    settings, model = task.settings, task.load()
    set_seed(task.seed)  # whatever has been drawn before: a resumed calibration quantizes fewer blocks
    schemes = {name: scheme for name, scheme in task.schemes.items() if scheme}
    roundings = {name: _rounding(model, name, scheme, held[name], settings.engine) for name, scheme in schemes.items()}
    enable_checkpointing(model)
    model.enable_input_require_grads()
    # By one regular expression: names in a list are matched by their ends.
    layers = "|".join(name.replace(".", r"\.") for name in schemes)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=f"({layers})"))
    model.peft_config["default"].base_model_name_or_path = ""
    dtype = model.get_base_model().dtype
    kind = next(iter(schemes.values()))
    round_layers(model, roundings, dtype, TARGETS["w8a8"].inputs if kind.activations == "dynamic" else None)
    _learn(model, task, _rate(model, task), view)
    base, switch = model.eval().get_base_model(), switch_of(model)
    assert switch is not None
    switch.on = kind.data_type == "int"
    with torch.no_grad():
        return {name: _weight(base.get_submodule(name)).cpu() for name in schemes}


def requantized(engine: Engine, layer: nn.Linear, scheme: LayerScheme, held: Tensors) -> QuantizedLayer:
    """The layer, whose weights are of `distill`, as the engine writes it, with the scales of what is held."""
    if scheme.data_type != "int":
        return engine.quantize(Block("", nn.ModuleDict({"layer": layer}), {"layer": scheme}))["layer"]
    from qft.quant.engines.compressed import hold

    scale = held["weight_scale"].to(layer.weight.device)
    return hold(layer, scheme, scale, torch.zeros_like(scale, dtype=torch.int8))


def _rounding(model: Any, name: str, scheme: LayerScheme, held: Tensors, engine: str) -> Rounding:
    if scheme.data_type != "int":
        return TARGETS[scheme.data_type].rounding
    layer = model.get_submodule(name)
    values = find_engine(engine).restore(linear_of(layer.weight.data), held, scheme).weight
    assert isinstance(values, torch.Tensor)
    return Scaled.reaching(scheme.bits, held["weight_scale"].to(values.device), layer.weight.data, values.data)


def _rate(model: Any, task: QuantizeTask) -> float:
    """calibrate.distill_learning_rate; auto is told by what is lost on the first windows."""
    if task.settings.distill_learning_rate != "auto":
        return task.settings.distill_learning_rate
    with torch.no_grad():
        lost = float(_loss(model, next(_batches(task))))
    return PEAK * min(math.sqrt(max(lost, 0.0) / LOST), 1.0)


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """KL divergence from the unquantized model, a token."""
    ids = batch.to(model.device)
    return distilled_loss(model, {"input_ids": ids, "labels": ids}, None)


def _learn(model: Any, task: QuantizeTask, rate: float, view: View) -> None:
    steps, every = task.settings.distill_steps, max(task.settings.distill_steps // 10, 1)
    view.note(f"Distilling from the unquantized model: {steps} steps, learning rate {rate:.1e}")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(steps * WARMUP), steps)
    for step, batch in enumerate(itertools.islice(_batches(task), steps), 1):
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0 or step == 1:
            view.note(f"step {step} of {steps}: KL {float(loss.detach()):.4f}")


def _batches(task: QuantizeTask) -> Iterator[torch.Tensor]:
    """Windows [windows, tokens], in an order drawn anew each time that all were seen."""
    draw, windows = torch.Generator().manual_seed(task.seed), torch.tensor(task.windows)
    while True:
        yield from torch.split(windows[torch.randperm(len(windows), generator=draw)], WINDOWS)


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = rounded_weight(layer)
    assert weight is not None
    return weight
