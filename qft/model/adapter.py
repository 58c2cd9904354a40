"""Adapters: attached to a base to be trained, written in peft's layout, put on a base again."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qft.checkpoint.conversion import FLOATS
from qft.checkpoint.finite import require_finite
from qft.checkpoint.skeleton import without_contents
from qft.checkpoint.weights import Weights
from qft.disk import disk_failures
from qft.documents.recorded import lies_beside
from qft.errors import ModelError, QftError, first_line
from qft.files import atomic_folder, read_json_text
from qft.memory.guard import memory_guard, smaller_base
from qft.model.rounded import round_weights, write_learnt
from qft.plan import ModelPlan, Plan
from qft.quant.beside import compute_beside
from qft.quant.dequantize import dequantized_weight, is_quantized

Bring = Callable[[nn.Module], None]
CHANGES_BASE = ("pissa", "olora")
"""Initialisations that move a part of the base weights into the adapter."""


def attach_adapter(model: PreTrainedModel, plan: Plan, bring: Bring | None = None) -> PeftModel | PreTrainedModel:
    """The model to train: LoRA adapters on a frozen base, or the base itself with all its weights; rounded as the plan
    says. `bring` has the weights of a layer there, if they wait elsewhere."""
    if plan.recipe.train.gradient_checkpointing:
        model.enable_input_require_grads()
    adapted = model.requires_grad_(True) if plan.lora is None else _with_new_adapter(model, plan, bring)
    round_weights(adapted, plan.model)
    return adapted


def _with_new_adapter(model: PreTrainedModel, plan: Plan, bring: Bring | None) -> PeftModel:
    with memory_guard("attaching the adapters", smaller_base(plan.recipe, plan.model.scheme)):
        adapted: PeftModel = get_peft_model(model, LoraConfig(**plan.lora or {}))
        compute_beside(adapted)
        if plan.model.checkpoint.gguf_file or plan.model.checkpoint.added:
            # Else peft would ask the hub for the base's config at each checkpoint, or write all of larger embeddings.
            adapted.peft_config["default"].base_model_name_or_path = ""
        if plan.recipe.adapter.init_lora_weights == "loftq":
            _start_from_quantization_error(adapted, plan, bring)
        if plan.recipe.adapter.use_dora and bring:
            _measure_again(adapted, bring)
    return adapted


def _measure_again(model: PeftModel, bring: Bring) -> None:
    """DoRA's magnitudes, where the weights were elsewhere when peft measured them."""
    for module in model.modules():
        for name, magnitude in getattr(module, "lora_magnitude_vector", {}).items():
            base = module.get_base_layer()
            bring(base)
            # As peft, which only then brings the adapters to float32.
            dtype = getattr(base, "compute_dtype", base.weight.dtype)
            measured = dtype if dtype.is_floating_point else torch.float32
            pair = {part: getattr(module, part)[name].weight.detach().to(measured) for part in ("lora_A", "lora_B")}
            held = magnitude.weight.dtype
            magnitude.update_layer(base_layer=base, scaling=module.scaling[name], **pair)
            magnitude.weight.data = magnitude.weight.data.to(held)


def save_adapter(
    model: PeftModel, plan: Plan, folder: Path, initial: Path | None, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter in peft's layout, atomically; `weights`: what is trained, where the model has parts of it. An
    adapter whose initialisation changed the base is written as the difference to `initial`, its state before training,
    so that it fits the original base (at twice the rank)."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = plan.model.checkpoint.path, plan.model.checkpoint.commit
    arguments: dict[str, Any] = {"state_dict": weights} if weights else {}
    with atomic_folder(folder, lies_beside) as temporary, warnings.catch_warnings():
        # To subtract it, peft loads the initial adapter beside the trained one, and warns of what it is asked to do.
        warnings.filterwarnings("ignore", message=".*changes the base weights of the model", category=UserWarning)
        if initial:  # a copy, as peft writes to what it is given
            copied = shutil.copytree(initial, temporary / initial.name)
            arguments["path_initial_model_for_weight_conversion"] = str(copied)
        # The vocabulary is never changed, so the base's embeddings need not travel with the adapter.
        model.save_pretrained(str(temporary), save_embedding_layers=False, **arguments)
        write_learnt(model, temporary)
        if initial:
            shutil.rmtree(copied)


def save_full(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    """Write all weights and the tokenizer as safetensors, atomically."""
    with atomic_folder(folder, lies_beside) as temporary:
        model.save_pretrained(str(temporary))
        write_learnt(model, temporary)
        plan.model.checkpoint.save_reader(plan.model.tokenizer, temporary)


def require_fit(adapter: Path, plan: ModelPlan) -> None:
    """Put the adapter in that folder on the base without contents, as peft will. Raises ModelError if the base has no
    place for one of its tensors, or one of another shape, or if it lacks one that its configuration asks for; peft
    itself would leave the first out."""
    if not (adapter / "adapter_model.safetensors").is_file():
        text = "its weights are pickled, and unpickling can run any code; convert them to safetensors"
        pickled = (adapter / "adapter_model.bin").exists()
        raise ModelError(f"{adapter}: {text if pickled else 'has no adapter_model.safetensors'}")
    try:
        with disk_failures(adapter):
            config = PeftConfig.from_pretrained(str(adapter))
            tensors = {
                name: tensor.to("meta") for name, tensor in load_peft_weights(str(adapter), device="cpu").items()
            }
        _require_rows(config, plan)
        config.init_lora_weights = False
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = without_contents(plan.checkpoint, plan.recipe.model)
            found = set_peft_model_state_dict(PeftModel(model, config), tensors)
    except KeyError as error:
        raise ModelError(_misfit(adapter, f"it holds no {error.args[0]}")) from error
    except (ValueError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(_misfit(adapter, next((x for x in lines if "size mismatch" in x), lines[0]))) from error
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]:
        raise ModelError(_misfit(adapter, f"its {strange[0]} cannot be {tensors[strange[0]].dtype}"))
    if found.unexpected_keys:
        raise ModelError(_misfit(adapter, f"it holds {found.unexpected_keys[0]}, for which the base has no module"))
    if missing := [name for name in found.missing_keys if "lora_" in name]:
        raise ModelError(_misfit(adapter, f"it holds no {missing[0]}"))


def _require_rows(config: Any, plan: ModelPlan) -> None:
    """Raise ValueError for rows of tokens that the base has not."""
    asked = getattr(config, "trainable_token_indices", None) or {}
    numbers = [number for own in ([asked] if isinstance(asked, list) else asked.values()) for number in own]
    known = max(plan.tokenizer.get_vocab().values())
    if max(numbers, default=0) > known:
        text = f"it trains token {max(numbers)}, and the last one of the base is {known}"
        raise ValueError(f"{text}: name the run itself, or give the base its tokens by a recipe's model.add_tokens")


def _misfit(adapter: Path, reason: str) -> str:
    kind = read_adapter_config(adapter).get("base_model_name_or_path")
    return f"{adapter}: does not fit this base (it names {kind!r} as its own): {reason}"


def with_adapter(model: Any, adapter: Path) -> Any:
    """`model` with the adapter in that folder. Raises ModelError if it does not fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            with disk_failures(adapter):
                adapted = PeftModel.from_pretrained(model, str(adapter))
        except QftError:
            raise
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{adapter}: is damaged or cut off: {first_line(error)}") from error
        except Exception as error:  # its files are data: whatever is wrong with them, peft stumbles over it
            raise ModelError(_misfit(adapter, first_line(error))) from error
    compute_beside(adapted)
    require_finite(adapter, ((name, p) for name, p in adapted.named_parameters() if ".default." in name))
    return adapted


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """What its adapter_config.json says. Raises ModelError if that is no JSON object, or has a key twice."""
    path = adapter / "adapter_config.json"
    try:
        with disk_failures(path):
            config = read_json_text(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object")
    return config


def _start_from_quantization_error(model: PeftModel, plan: Plan, bring: Bring | None) -> None:
    """LoftQ's first step (arXiv:2310.08659): the adapter starts as the best rank-r fit of what quantizing lost."""
    checkpoint = plan.model.checkpoint
    original = Weights(checkpoint, without_contents(checkpoint, plan.recipe.model))
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None or not is_quantized(base):
            continue
        if bring:
            bring(base)
        held = dequantized_weight(base).float()
        weight = original(f"{name.removeprefix('base_model.model.')}.weight").to(held.device, torch.float32)
        if getattr(base, "source_cls", None) is Conv1D:
            weight = weight.T  # its own is [in, out], and bitsandbytes holds it as that of a linear layer
        error = weight - held
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        r = module.r["default"]
        root = (s[:r] / module.scaling["default"]).sqrt()
        module.lora_B["default"].weight.data.copy_(u[:, :r] * root)
        module.lora_A["default"].weight.data.copy_(root[:, None] * v[:r])
