"""Recipe + what is known of model, data and device -> Plan. The only place where an `auto` is decided.

Nothing here loads a weight: the model is built on the meta device, where tensors have shapes and no contents.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from qft.checkpoints import Checkpoint, find_checkpoint, load_tokenizer
from qft.data.prepare import Prepared, prepare
from qft.errors import RecipeError
from qft.machine import Device, find_device
from qft.recipe import LoadedRecipe, Recipe
from qft.schemes import SCHEMES, prequantized

__all__ = ["Plan", "Shape", "make_plan"]


@dataclass(frozen=True)
class Shape:
    """What the model is made of, counted without its weights."""

    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    linear_parameters: int
    """Weights of the linear layers that quantization applies to (all but the output head)."""
    trainable_parameters: int
    max_positions: int | None
    """Longest sequence, in tokens, that the model was built for."""
    heads: tuple[str, ...]
    """Names of the output head."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before anything is loaded."""

    loaded: LoadedRecipe
    device: Device
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    dtype: str
    """Of the weights that are not quantized."""
    scheme: str
    """Key of SCHEMES, or the method of a checkpoint that comes quantized."""
    quantization: dict[str, Any]
    """Arguments of the quantization config; empty if nothing is quantized here."""
    lora: dict[str, Any] | None
    """Arguments of peft.LoraConfig."""
    training: dict[str, Any]
    """Arguments of TrainingArguments, beside the folders."""
    data: Prepared

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        train = self.recipe.train
        micro_batches = math.ceil(len(self.data.train) / train.per_device_train_batch_size)
        return max(math.ceil(micro_batches / train.gradient_accumulation_steps), 1)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps in all."""
        train = self.recipe.train
        return train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * self.steps_per_epoch)

    def facts(self) -> dict[str, Any]:
        """The plan as plain values, for `qft check --json` and the manifest."""
        return {
            "device": asdict(self.device),
            "model": {
                "path": self.checkpoint.path,
                "commit": self.checkpoint.commit,
                "dtype": self.dtype,
                **asdict(self.shape),
            },
            "quantization": {"scheme": self.scheme, **(self.quantization or self.checkpoint.quantization)},
            "adapter": self.lora,
            "training": self.training,
            "data": {
                "train_rows": len(self.data.train),
                "eval_rows": len(self.data.eval) if self.data.eval else 0,
                "sources": self.data.facts(),
            },
            "steps": self.steps,
        }


def make_plan(loaded: LoadedRecipe) -> Plan:
    """Decide everything. Raises RecipeError for what model, data or device cannot do; MissingError, DataError,
    ModelError as the layers below."""
    recipe = loaded.recipe
    device = _device(loaded)
    _refuse(loaded, [*_device_problems(recipe, device), *_package_problems(recipe)])
    checkpoint = find_checkpoint(recipe)
    if checkpoint.quantization:
        _refuse(
            loaded, [*prequantized.contradictions(checkpoint.quantization, loaded), *_trainability(recipe, checkpoint)]
        )
    dtype = _dtype(recipe, device)
    lora = _lora_arguments(recipe) if recipe.adapter.kind == "lora" else None
    shape = _shape(loaded, checkpoint, lora)
    _refuse(loaded, _length_problems(recipe, shape))
    tokenizer = load_tokenizer(checkpoint, recipe)
    compute_dtype = recipe.quant.compute_dtype if recipe.quant.compute_dtype != "auto" else dtype
    if checkpoint.quantization:
        scheme, quantization = prequantized.mode(checkpoint.quantization), {}
    else:
        scheme = recipe.quant.mode
        quantization = SCHEMES[scheme].config(recipe.quant, compute_dtype, list(shape.heads))
    return Plan(
        loaded=loaded,
        device=device,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        shape=shape,
        dtype=dtype,
        scheme=scheme,
        quantization=quantization,
        lora=lora,
        training=_training_arguments(recipe, device),
        data=prepare(recipe, tokenizer),
    )


def _refuse(loaded: LoadedRecipe, problems: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    found = [loaded.problem(field, text) for field, text in problems]
    if found:
        raise RecipeError(found)


def _device(loaded: LoadedRecipe) -> Device:
    device = find_device(loaded.recipe.model.device)
    if device is None:
        text = "this torch sees no CUDA device; set it to auto or cpu, or install a CUDA build of torch"
        raise RecipeError(loaded.problem("model.device", text))
    return device


def _device_problems(recipe: Recipe, device: Device) -> Iterator[tuple[str, str]]:
    model, train = recipe.model, recipe.train
    if not device.bf16:
        remedy = f"{device.name} has no bfloat16; use float16 or float32"
        if model.dtype == "bfloat16":
            yield "model.dtype", remedy
        if recipe.quant.mode == "4bit" and recipe.quant.compute_dtype == "bfloat16":
            yield "quant.compute_dtype", remedy
        if train.bf16 is True:
            yield "train.bf16", f"{device.name} has no bfloat16; set it to false, and train.fp16 to true"
    if train.tf32 is True and not device.tf32:
        yield "train.tf32", f"{device.name} has no TensorFloat-32; set it to auto or false"
    if device.kind == "cpu":
        yield from _cpu_problems(recipe)


def _cpu_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    train, attention = recipe.train, recipe.model.attn_implementation
    if train.fp16:
        yield "train.fp16", "float16 with loss scaling needs a GPU; set it to false, and train.bf16 to true"
    if train.dataloader_pin_memory is True:
        yield "train.dataloader_pin_memory", "is for copies to a GPU; set it to auto or false"
    if train.optim.startswith("paged"):
        yield "train.optim", f"{train.optim} pages between GPU and host; on a CPU use adamw_8bit or adamw_torch"
    if attention.startswith("flash"):
        yield "model.attn_implementation", f"{attention} needs a GPU; use sdpa"


def _package_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    needed: list[tuple[str, str, str]] = [("train.report_to", name, name) for name in recipe.train.report_to]
    if recipe.model.attn_implementation == "flash_attention_2":
        needed.append(("model.attn_implementation", "flash_attn", "flash-attn"))
    for field, module, package in needed:
        if importlib.util.find_spec(module) is None:
            yield field, f"{package} is not installed; pip install {package}, or change the field"


def _trainability(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    if recipe.adapter.kind == "none":
        yield (
            "adapter.kind",
            f"the checkpoint is quantized ({prequantized.method(checkpoint.quantization)}), and quantized weights "
            "cannot be trained themselves: set it to lora",
        )
    reason = prequantized.untrainable(checkpoint.quantization)
    if reason:
        yield "model.path", reason
    if recipe.train.torch_compile:
        yield "train.torch_compile", "a quantized base cannot be compiled for training; set it to false"
    if recipe.adapter.init_lora_weights not in ("default", "gaussian"):
        yield (
            "adapter.init_lora_weights",
            f"{recipe.adapter.init_lora_weights} needs the unquantized weights, and this checkpoint has none",
        )


def _length_problems(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, str]]:
    longest = shape.max_positions
    if longest and recipe.data.max_length > longest:
        yield "data.max_length", f"{recipe.data.max_length}, and the model was built for {longest} tokens"


def _dtype(recipe: Recipe, device: Device) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    # An update is far smaller than its weight: in 16 bits most of it would be rounded away.
    if recipe.adapter.kind == "none":
        return "float32"
    return "bfloat16" if device.bf16 else "float16"


def _lora_arguments(recipe: Recipe) -> dict[str, Any]:
    adapter = recipe.adapter
    arguments: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in adapter if name != "kind"
    }
    # loftq starts from the error of our own quantization, so models.py sets it once the weights are there.
    known = {"default": True, "loftq": True}
    arguments["init_lora_weights"] = known.get(adapter.init_lora_weights, adapter.init_lora_weights)
    arguments["modules_to_save"] = list(adapter.modules_to_save) or None
    return arguments | {"task_type": "CAUSAL_LM"}


# Fields of `train` that are qft's own, or that it hands over in another form.
NOT_TRAINING_ARGUMENTS = {
    "early_stopping_patience",
    "on_nonfinite",
    "gradient_checkpointing",
    "report_to",
    "bf16",
    "tf32",
}


def _training_arguments(recipe: Recipe, device: Device) -> dict[str, Any]:
    train = recipe.train
    arguments = {name: value for name, value in train if name not in NOT_TRAINING_ARGUMENTS}
    arguments |= {
        "bf16": _mixed_bf16(recipe, device),
        "tf32": device.tf32 if train.tf32 == "auto" else train.tf32,
        "seed": recipe.seed,
        "use_cpu": device.kind == "cpu",
        "dataloader_pin_memory": device.kind == "cuda" and train.dataloader_pin_memory is not False,
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
    if train.load_best_model_at_end:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    # transformers renamed gradient checkpointing; the recipe keeps the name that people know.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments[name] = train.gradient_checkpointing
    if train.gradient_checkpointing:
        arguments[f"{name}_kwargs"] = {"use_reentrant": False}
    return arguments


def _mixed_bf16(recipe: Recipe, device: Device) -> bool:
    if recipe.train.bf16 != "auto":
        return recipe.train.bf16
    asks_float32 = recipe.model.dtype == "float32" or (
        recipe.quant.mode == "4bit" and recipe.quant.compute_dtype == "float32"
    )
    return device.bf16 and not recipe.train.fp16 and not asks_float32


def _shape(loaded: LoadedRecipe, checkpoint: Checkpoint, lora: dict[str, Any] | None) -> Shape:
    """Build the model without contents, attach the adapters, and count."""
    config = checkpoint.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=loaded.recipe.model.trust_remote_code, dtype=torch.float32
        )
    head = model.get_output_embeddings()
    heads = tuple(name for name, module in model.named_modules() if module is head)
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in heads]
    text = config.get_text_config()
    shape = Shape(
        architecture=type(model).__name__,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=sum(module.weight.numel() for module in linears),
        trainable_parameters=sum(p.numel() for p in model.parameters()),
        max_positions=getattr(text, "max_position_embeddings", None),
        heads=heads,
    )
    if lora is None:
        return shape
    return dataclasses.replace(shape, trainable_parameters=_trainable(loaded, model, lora))


def _trainable(loaded: LoadedRecipe, model: nn.Module, lora: dict[str, Any]) -> int:
    """Trainable parameters once the adapters are attached. Raises RecipeError if they fit nowhere."""
    names = sorted({n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)})
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**lora | {"init_lora_weights": False}))
    except (ValueError, KeyError) as error:
        text = f"{str(error).splitlines()[0]} (the linear layers are called {', '.join(names)})"
        raise RecipeError(loaded.problem("adapter.target_modules", text)) from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
