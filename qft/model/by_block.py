"""A base model read block by block from the files of unquantized weights: built without contents, and each weight held
as the scheme says before the next one is read, so that the unquantized model is nowhere whole."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from qft.checkpoint.require import require_weights
from qft.checkpoint.skeleton import find_blocks, without_contents
from qft.checkpoint.weights import Weights
from qft.model.fill import fill
from qft.model.held import held
from qft.plan import ModelPlan
from qft.quant.experts import owner
from qft.quant.hold import AsPacked, Scheme

Take = Callable[[nn.Module, str], None]
"""Given each block, by its name, once its weights are there."""


def load_by_block(plan: ModelPlan, device: str, take: Take = lambda *_: None) -> PreTrainedModel:
    """The model on `device`. Raises whatever reading does."""
    checkpoint, section, dtype = plan.checkpoint.with_weights(), plan.recipe.model, getattr(torch, plan.dtype)
    if checkpoint.hub_id:  # nobody has seen its files before
        require_weights(checkpoint.as_stored, without_contents(checkpoint.as_stored, section), plan.recipe)
    model = plan.skeleton_in_dtype().eval()
    read = Weights(checkpoint, plan.skeleton)
    experts = plan.scheme.holds_experts(model)
    quantizer = _prepared(plan, model)
    name, blocks = find_blocks(model, plan.shape.layers)
    hold = _Hold(plan.scheme, {(model.get_submodule(owner(own)), own.rpartition(".")[2]) for own in experts})
    place, packed = (device, dtype), plan.scheme.weights if isinstance(plan.scheme, AsPacked) else ()

    def kept(name: str, meta: torch.Tensor) -> nn.Parameter | None:
        weight = read.as_packed(name) if name in packed else None
        return held(weight, plan.skeleton, meta, place) if weight else None

    fill(model, model, "", read, place, skip=f"{name}.", hold=hold, take=kept)
    model.tie_weights()
    for number, block in enumerate(blocks):
        fill(model, block, f"{name}.{number}.", read, place, hold=hold, take=kept)
        take(block, f"{name}.{number}")
    if quantizer:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.generation_config = generation_config(plan)
    return model


def generation_config(plan: ModelPlan) -> GenerationConfig:
    """The base's own, or what its configuration says of generation."""
    checkpoint = plan.checkpoint
    if checkpoint.gguf_file is None and (checkpoint.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint.folder)
    return GenerationConfig.from_model_config(checkpoint.config)


def _prepared(plan: ModelPlan, model: PreTrainedModel) -> Any:
    """The quantizer that has put its layers into the model without contents; None: nothing is quantized."""
    arguments = plan.scheme.load_arguments()
    if not arguments:
        return None
    quantizer = AutoHfQuantizer.from_config(arguments["quantization_config"], pre_quantized=False)
    quantizer.preprocess_model(model, dtype=getattr(torch, plan.dtype), device_map={"": plan.device.kind})
    return quantizer


class _Hold:
    """As transformers' Bnb4bitQuantize and Bnb8bitQuantize have it, on the device of the value; experts as the scheme
    has them."""

    def __init__(self, scheme: Scheme, experts: Collection[tuple[nn.Module, str]]) -> None:
        self.scheme, self.experts = scheme, experts

    def __call__(self, module: Any, key: str, value: torch.Tensor) -> torch.Tensor | None:
        if (module, key) in self.experts:
            return self.scheme.stacked(value) if value.shape == getattr(module, key).shape else None
        if key != "weight" or not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            return None
        value = value.T if issubclass(module.source_cls, Conv1D) else value
        settings = {name: own for name, own in module.weight.__dict__.items() if name != "SCB"}
        if isinstance(module, bnb.nn.Linear4bit):
            held: torch.Tensor = bnb.nn.Params4bit(value, requires_grad=False, **settings).to(value.device)
        else:  # bitsandbytes rounds on the way from the host to the device, and weights that are there already not
            held = bnb.nn.Int8Params(value.cpu(), requires_grad=False, **settings).to(value.device)
        return held
