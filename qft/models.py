"""Plan -> model: the only place that loads weights, and where adapters are attached and written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from qft.checkpoints import Checkpoint
from qft.errors import ModelError, OutOfMemoryError, QftError
from qft.files import atomic_file, atomic_folder, write_json
from qft.plan import ModelPlan, Plan
from qft.schemes import SCHEMES

__all__ = [
    "attach_adapter",
    "generation_config",
    "load_base",
    "memory_guard",
    "read_weights",
    "save_adapter",
    "save_full",
    "save_tensors",
    "settle",
    "tensors_in",
    "write_index",
]

CHANGES_BASE = ("pissa", "olora")
"""Initialisations that move a part of the base weights into the adapter."""

SMALLER_TRAINING = (
    "Lower train.per_device_train_batch_size (and raise gradient_accumulation_steps by as much), lower "
    "data.max_length, set train.gradient_checkpointing: true, or hold the base in fewer bits (quant.mode: 4bit)"
)


def load_base(plan: ModelPlan) -> PreTrainedModel:
    """The base model on its device, quantized as planned, its other weights in plan.dtype."""
    with memory_guard("loading the model"):
        try:
            model = _load(plan)
        except QftError:
            raise
        except (ValueError, OSError, ImportError, KeyError) as error:
            raise ModelError(f"{plan.checkpoint.path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    if plan.plugin:
        plan.plugin.require_layers(model)
    settle(model, plan.scheme)
    return model


def settle(model: torch.nn.Module, scheme: str) -> None:
    """Bring a freshly loaded model into the state that training and saving rely on. Called after every load."""
    if scheme in SCHEMES:
        SCHEMES[scheme].after_load(model)


def attach_adapter(model: PreTrainedModel, plan: Plan) -> PeftModel | PreTrainedModel:
    """The model to train: LoRA adapters on a frozen base, or the base itself with all its weights."""
    if plan.recipe.train.gradient_checkpointing:
        model.enable_input_require_grads()
    if plan.lora is None:
        return model.requires_grad_(True)
    with memory_guard("attaching the adapters"):
        adapted = get_peft_model(model, LoraConfig(**plan.lora))
        if plan.checkpoint.gguf_file:
            # Else peft would ask the hub for the base's config at each checkpoint.
            adapted.peft_config["default"].base_model_name_or_path = ""
        if plan.recipe.adapter.init_lora_weights == "loftq":
            _start_from_quantization_error(adapted, plan)
    return adapted


def save_adapter(model: PeftModel, plan: Plan, folder: Path, initial: Path | None) -> None:
    """Write the adapter in peft's layout, atomically.

    An adapter whose initialisation changed the base is written as the difference to `initial`, its state before
    training, so that it fits the original base (at twice the rank).
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = plan.checkpoint.path, plan.checkpoint.commit
    arguments = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    with atomic_folder(folder) as temporary, warnings.catch_warnings():
        # To subtract it, peft loads the initial adapter beside the trained one, and warns of what it is asked to do.
        warnings.filterwarnings("ignore", message=".*changes the base weights of the model", category=UserWarning)
        # The vocabulary is never changed, so the base's embeddings need not travel with the adapter.
        model.save_pretrained(str(temporary), save_embedding_layers=False, **arguments)


def save_full(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    """Write all weights and the tokenizer as safetensors, atomically."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        plan.tokenizer.save_pretrained(str(temporary))


@contextmanager
def memory_guard(what: str, remedy: str = SMALLER_TRAINING) -> Iterator[None]:
    """Turn an allocator's failure into one message that says what to change."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_out_of_memory(what, remedy, error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(_out_of_memory(what, remedy, error)) from error


def _out_of_memory(what: str, remedy: str, error: BaseException) -> str:
    return (
        f"out of memory while {what}: {str(error).splitlines()[0] if str(error) else 'the host has no more'}. {remedy}"
    )


def _load(plan: ModelPlan) -> PreTrainedModel:
    model = plan.recipe.model
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, plan.dtype),
        "device_map": {"": 0 if plan.device.kind == "cuda" else "cpu"},
        "trust_remote_code": model.trust_remote_code,
    }
    if model.attn_implementation != "auto":
        arguments["attn_implementation"] = model.attn_implementation
    if plan.plugin:
        plan.plugin.activate()
    if plan.quantization:
        arguments["quantization_config"] = AutoQuantizationConfig.from_dict(plan.quantization)
    if plan.checkpoint.gguf_file:
        # transformers reads a GGUF file or quantizes, not both at once: dequantize first, then load from memory.
        dequantized = _dequantized(plan.checkpoint, arguments["dtype"])
        del arguments["trust_remote_code"]
        return type(dequantized).from_pretrained(
            None, config=plan.checkpoint.config, state_dict=dequantized.state_dict(), **arguments
        )
    checkpoint = plan.checkpoint.with_weights()
    return AutoModelForCausalLM.from_pretrained(**checkpoint.load_arguments, use_safetensors=True, **arguments)


def _dequantized(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    arguments = checkpoint.load_arguments
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on, GGUF weights stay packed unless told otherwise
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype)


def _start_from_quantization_error(model: PeftModel, plan: Plan) -> None:
    """LoftQ's first step (arXiv:2310.08659): the adapter starts as the best rank-r fit of what quantizing lost."""
    original = read_weights(plan.checkpoint)
    base_name = "base_model.model."
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, bnb.nn.Linear4bit):
            continue
        weight = base.weight
        held = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        error = original(f"{name.removeprefix(base_name)}.weight").to(held.device, torch.float32) - held
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        r = module.r["default"]
        root = (s[:r] / module.scaling["default"]).sqrt()
        module.lora_B["default"].weight.data.copy_(u[:, :r] * root)
        module.lora_A["default"].weight.data.copy_(root[:, None] * v[:r])


def read_weights(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A function from a parameter's name to its unquantized value."""
    if checkpoint.gguf_file:
        weights: dict[str, torch.Tensor] = _dequantized(checkpoint, torch.float32).state_dict()
        return weights.__getitem__
    where = tensors_in(checkpoint.weight_files())

    def read(name: str) -> torch.Tensor:
        if name not in where:
            raise ModelError(f"{checkpoint.path}: has no weight called {name}")
        with safe_open(where[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    return read


def generation_config(plan: ModelPlan) -> GenerationConfig:
    """The base's own, or what its configuration says of generation."""
    checkpoint = plan.checkpoint
    if checkpoint.gguf_file is None and (checkpoint.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint.folder)
    return GenerationConfig.from_model_config(checkpoint.config)


def tensors_in(paths: Iterable[Path]) -> dict[str, Path]:
    """Which of the safetensors files holds which tensor, by its name."""
    where: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    return where


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, header: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write one safetensors file, atomically; `header` is what it says beside its format."""
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"} | dict(header))


def write_index(folder: Path) -> None:
    """model.safetensors.index.json of the safetensors files in `folder`: which file holds which tensor."""
    paths = sorted(folder.glob("*.safetensors"))
    where = {name: path.name for name, path in sorted(tensors_in(paths).items())}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in paths)}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)
