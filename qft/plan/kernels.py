"""Which parts of a model are to be computed by kernels of qft's own in training, and why others are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from qft.checkpoint.skeleton import find_blocks
from qft.errors import ModelError
from qft.kernels import FLOAT8, LINEAR, MLP, NORM, ROTARY
from qft.plan.model import ModelPlan
from qft.recipe import Recipe
from qft.recipe.section import Problem

HOPPER = (9, 0)
"""The first compute capability whose float8 is tried here."""


def planned_kernels(model: ModelPlan, *, mixed: bool, sharded: bool = False) -> dict[str, str | None]:
    """Of each kind of part, why its own code computes it; None: kernels do, if they agree with that on the model."""
    everywhere = "weights are sharded (fsdp2)" if sharded else _nowhere(model)
    products = everywhere or _no_products(model, mixed=mixed)
    planned = {MLP: products, LINEAR: products, NORM: everywhere, ROTARY: everywhere}
    asked = model.recipe.train.matmul == "fp8"
    return planned | ({FLOAT8: products or _no_float8(model)} if asked else {})


def kernel_problems(recipe: Recipe, planned: dict[str, str | None]) -> Iterator[Problem]:
    """What stands in the way where they are demanded."""
    planned = dict(planned)
    if reason := planned.pop(FLOAT8, None):
        yield "train.matmul", f"fp8 is not to be had: {reason}; set it to 16bit"
    if recipe.train.kernels == "fused":
        for reason in dict.fromkeys(reason for reason in planned.values() if reason):
            kinds = ", ".join(kind for kind, own in planned.items() if own == reason)
            yield "train.kernels", f"{kinds} cannot be fused: {reason}; set it to auto"


def _nowhere(model: ModelPlan) -> str | None:
    """Why no part is."""
    recipe, device = model.recipe, model.device
    if recipe.train.kernels == "plain":
        return "train.kernels is plain"
    if device.kind != "cuda":
        return "the kernels are for a GPU"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if recipe.train.torch_compile:
        return "train.torch_compile makes kernels of its own"
    try:
        find_blocks(model.skeleton, model.shape.layers)
    except ModelError as error:
        return str(error)
    return None


def _no_products(model: ModelPlan, *, mixed: bool) -> str | None:
    """Why no product with a weight is."""
    recipe, scheme = model.recipe, model.scheme
    adapter = recipe.adapter
    if adapter.kind == "none":
        return "all weights are trained (adapter.kind none)"
    if adapter.lora_dropout:
        return f"adapter.lora_dropout is {adapter.lora_dropout:g}, and only without it is LoRA part of the weight"
    if adapter.use_dora:
        return "adapter.use_dora scales the whole weight"
    if scheme.name not in ("none", "4bit"):
        return f"weights held as {scheme.name} are multiplied by their own code"
    if recipe.memory.offload != "none":
        return f"memory.offload is {recipe.memory.offload}: the weights come and go"
    if "float32" in (scheme.compute_dtype, model.dtype):
        return "products are in float32"
    return None if mixed else "train.bf16 and fp16 are off: LoRA is computed in float32"


def _no_float8(model: ModelPlan) -> str | None:
    """Why products with weights are not in float8, where kernels take them."""
    capability = model.device.capability
    if capability and tuple(map(int, capability.split("."))) < HOPPER:
        return f"{model.device.name} (compute capability {capability}) is older than Hopper (9.0), which has it"
    if torch.version.hip:
        return "it is for NVIDIA's GPUs"
    dtype = model.scheme.compute_dtype or model.dtype
    return None if dtype == "bfloat16" else f"its products are summed up to bfloat16, and these to {dtype}"
