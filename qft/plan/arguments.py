"""What a recipe says to the libraries that honour it: the arguments of peft and of the Trainer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import TrainingArguments

from qft.machine.device import Device
from qft.plan.placement import ALONE, Placement
from qft.recipe import Recipe

OWN_ADAPTER = {"kind", "target_experts", "target_towers"}


def lora_arguments(recipe: Recipe) -> dict[str, Any]:
    """Of peft.LoraConfig."""
    adapter = recipe.adapter
    arguments: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in adapter if n not in OWN_ADAPTER}
    # loftq starts from the error of our own quantization, so model/adapter.py sets it once the weights are there.
    known = {"default": True, "loftq": True}
    arguments["init_lora_weights"] = known.get(adapter.init_lora_weights, adapter.init_lora_weights)
    arguments["modules_to_save"] = list(adapter.modules_to_save) or None
    return arguments | {"task_type": "CAUSAL_LM"}


# Fields of `train` that are qft's own, or that it hands over in another form.
OWN_FIELDS = {"early_stopping_patience", "on_nonfinite", "gradient_checkpointing", "report_to", "bf16", "tf32"}
OWN_FIELDS |= {"save_on_signal", "chunked_loss", "stages", "kernels", "matmul", "router_aux_loss_coef"}


def training_arguments(recipe: Recipe, device: Device, placement: Placement = ALONE) -> dict[str, Any]:
    """Of transformers.TrainingArguments, in each process."""
    train = recipe.train
    arguments = {name: value for name, value in train if name not in OWN_FIELDS}
    arguments |= {
        "bf16": mixed_bf16(recipe, device),
        "tf32": device.tf32 if train.tf32 == "auto" else train.tf32,
        "seed": recipe.seed,
        "gradient_accumulation_steps": train.gradient_accumulation_steps // placement.size,
        "use_cpu": device.kind == "cpu",
        "dataloader_pin_memory": device.kind == "cuda" and train.dataloader_pin_memory is not False,
        "accelerator_config": {"non_blocking": device.kind == "cuda" and train.dataloader_pin_memory is not False},
        # TensorBoard's events belong in the run folder, which only its own callback can be told.
        "report_to": [name for name in train.report_to if name != "tensorboard"],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
    }
    if not device.tf32 and arguments["tf32"] is False:
        arguments["tf32"] = None  # False is an error to transformers where there is nothing to turn off
    if placement.size > 1:
        # Else DDP would look through the graph of each step for weights that nothing came of.
        unused = recipe.adapter.target_towers or recipe.adapter.target_experts is True
        arguments |= {"ddp_find_unused_parameters": unused, "ddp_broadcast_buffers": False}
        arguments["ddp_timeout"] = recipe.distributed.timeout
        arguments["ddp_backend"] = "gloo" if device.kind == "cpu" else None
    if train.load_best_model_at_end:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    # transformers renamed gradient checkpointing; the recipe keeps the name that people know.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments[name] = train.gradient_checkpointing
    if train.gradient_checkpointing:
        arguments[f"{name}_kwargs"] = {"use_reentrant": False}
    return arguments


def mixed_dtype(recipe: Recipe, device: Device) -> torch.dtype | None:
    """Of autocast; None: there is none."""
    return torch.bfloat16 if mixed_bf16(recipe, device) else torch.float16 if recipe.train.fp16 else None


def mixed_bf16(recipe: Recipe, device: Device) -> bool:
    """Whether it is bfloat16."""
    if recipe.train.bf16 != "auto":
        return recipe.train.bf16
    mixes_halves = device.kind == "cpu" and recipe.model.dtype == "float16"  # a CPU multiplies no two kinds of 16 bits
    without = recipe.train.fp16 or mixes_halves or "float32" in (recipe.quant.compute_dtype, recipe.model.dtype)
    return device.bf16 and not without
