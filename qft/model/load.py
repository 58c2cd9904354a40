"""Plan -> model: the only place that loads one to be run."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from qft.checkpoint.find import Checkpoint
from qft.checkpoint.finite import require_finite
from qft.checkpoint.language import auto_class
from qft.checkpoint.require import incomplete_layers, require_loaded, require_weights
from qft.checkpoint.skeleton import without_contents
from qft.checkpoint.stored import some
from qft.checkpoint.weights import dequantized, stored_weights
from qft.disk import disk_failures
from qft.errors import ModelError, QftError, first_line
from qft.memory.guard import memory_guard, smaller_base
from qft.model.by_block import load_by_block
from qft.plan import ModelPlan
from qft.plan.experts import set_balance


def load_base(plan: ModelPlan, load: Callable[[ModelPlan], PreTrainedModel] | None = None) -> PreTrainedModel:
    """The base model on its device, quantized as planned, its other weights in plan.dtype. `load` puts it there; None:
    transformers does, the whole of it."""
    with memory_guard("loading the model", smaller_base(plan.recipe, plan.scheme)):
        try:
            # Caches, and code that comes with a model, are written on the way.
            with disk_failures(plan.checkpoint.folder):
                model = (load or _load)(plan)
        except (QftError, MemoryError):
            raise
        except Exception as error:  # transformers, safetensors and the quantizers fail in as many ways as they are
            if "memory" in str(error):  # the guard tells those of an allocator from the others
                raise
            told = isinstance(error, RuntimeError) and plan.checkpoint.quantization
            reason = _unconverted(plan, error) if told else f"cannot be loaded: {first_line(error)}"
            raise ModelError(f"{plan.checkpoint.path}: {reason}") from error
    if misfits := plan.scheme.misfits(model):
        raise ModelError(f"{plan.checkpoint.path}: the quantized weights of {some(misfits)} are not of their shapes")
    _require_settings(plan, model.generation_config)
    plan.scheme.settle(model)
    set_balance(plan.recipe, model)
    return model


def _load(plan: ModelPlan) -> PreTrainedModel:
    """By transformers; block by block what it knows not: experts that are held in few bits, and files whose weights are
    dequantized where they are read."""
    if not plan.checkpoint.packed and not plan.scheme.holds_experts(plan.skeleton):
        return load_whole(plan)
    device = torch.device("cuda", torch.cuda.current_device()) if plan.device.kind == "cuda" else torch.device("cpu")
    return load_by_block(plan, str(device))


def _require_settings(plan: ModelPlan, settings: GenerationConfig | None) -> None:
    """Raise ModelError for what generation would stumble over: what is no token's number, or no kind of cache."""
    kinds: dict[str, type] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), int)
    for name, kind in (kinds | {"cache_implementation": str}).items():
        value = getattr(settings, name, None)
        values = value if isinstance(value, list) and kind is int else [value]
        if any(type(each) is not kind for each in values if each is not None):
            text = f"its generation_config.json or config.json has {name} {value!r}, which means nothing"
            raise ModelError(f"{plan.checkpoint.path}: {text}")


def load_whole(plan: ModelPlan, device: str | None = None) -> PreTrainedModel:
    """As transformers loads it, on `device` (None: on the planned one), and with the tokens that the recipe adds.
    Raises whatever transformers does."""
    loaded = _as_stored(plan, plan.checkpoint.as_stored, device)
    if added := plan.checkpoint.added:
        added.put_into(loaded)
    return loaded


def _as_stored(plan: ModelPlan, checkpoint: Checkpoint, device: str | None) -> PreTrainedModel:
    model, kind = plan.recipe.model, device or plan.device.kind
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, plan.dtype),
        "device_map": {"": torch.cuda.current_device() if kind == "cuda" else "cpu"},
        "trust_remote_code": model.trust_remote_code,
    }
    arguments |= plan.attention | plan.scheme.load_arguments()
    if checkpoint.gguf_file:
        # transformers reads a GGUF file or quantizes, not both at once: dequantize first, then load from memory.
        whole = dequantized(checkpoint, arguments["dtype"])
        del arguments["trust_remote_code"]
        settings, state = checkpoint.config, whole.state_dict()
        return type(whole).from_pretrained(None, config=settings, state_dict=state, **arguments)
    checkpoint = checkpoint.with_weights()
    if checkpoint.hub_id:  # nobody has seen its files before
        require_weights(checkpoint, without_contents(checkpoint, model), plan.recipe)
    # Else transformers would say of one tensor's shape that it is wrong, and of none's which.
    arguments |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, info = auto_class(checkpoint.config).from_pretrained(**checkpoint.load_arguments, **arguments)
    require_loaded(checkpoint, loaded, info, plan.recipe)
    # What few bits hold says no more what it was made of.
    held = stored_weights(checkpoint) if not plan.scheme.keeps_weights else loaded.named_parameters()
    require_finite(checkpoint.path, held)
    return loaded


def _unconverted(plan: ModelPlan, error: Exception) -> str:
    """What transformers could not put together, as far as one can tell: it names nothing."""
    lacking = incomplete_layers(plan.checkpoint.tensors())
    where = "".join(f"; {layer} lacks {some(names)}" for layer, names in list(lacking.items())[:3])
    return f"its quantized weights cannot be put together: {first_line(error).partition(' For details')[0]}{where}"
