"""The part of a model that reads and writes text, found by structure: of a checkpoint for images and text it is the
decoder with its embeddings and its head, and what lies beside it (towers, what projects their output) sees or hears."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

AUTO = {
    "AutoModelForCausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForImageTextToText": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
"""Classes that a model is loaded through, the first that has its kind, and the model classes of each type."""
REFUSED = {
    **dict.fromkeys(
        ("cpmant", "paligemma", "xlm", "xlnet"),
        "reads in both directions, so that it would see the tokens that it is to predict",
    ),
    "prophetnet": "answers no rows of several lengths at once",
}
"""Why, of model types that neither configuration nor structure tell: what they do with rows of text alone."""


def auto_class(config: PretrainedConfig) -> Any:
    """What loads the model whole: the one that makes the class that the configuration names in `architectures`, else
    one that comes with it, else the first that knows the type, which may load a part (the language model of a
    checkpoint for images)."""
    own = getattr(config, "auto_map", None) or {}
    written = set(config.architectures or ())
    known = [(auto, names.get(config.model_type)) for auto, names in AUTO.values()]
    exact = [auto for auto, made in known if made in written]
    remote = [auto for name, (auto, _) in AUTO.items() if name in own]
    return next(iter([*exact, *remote, *(auto for auto, made in known if made)]), AutoModelForCausalLM)


def text_problem(model: PreTrainedModel) -> str | None:
    """Why a causal language model cannot be trained of it with text alone; None if it can."""
    config, asked = model.config, inspect.signature(model.forward).parameters.items()
    wanted = [name for name, p in asked if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder beside its decoder, and rows of text are for a decoder alone"
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if getattr(config.get_text_config(), "is_decoder", None) is False and not _is_causal(model):
        return "reads in both directions: its config.json does not say is_decoder"
    if getattr(config, "rescale_every", 0) and hasattr(model.base_model, "_rescale_layers"):
        return "changes its weights when it is evaluated; set rescale_every to 0 in its config.json"
    if "shared_kv_states" in dict(asked):
        return "drafts for another model, whose keys and values it reads"
    if others := [name for name in wanted if name != "input_ids"]:
        return f"wants {' and '.join(others)}, which rows of text do not have"
    if "input_ids" not in dict(asked) or model.get_input_embeddings() is None:
        return "takes no tokens"
    return None


def beside_language(model: PreTrainedModel) -> list[str]:
    """Names of the outermost modules that are no part of the language model: towers and projectors. Empty for a model
    of text alone."""
    within = _language_modules(model)
    return [] if within is None else list(_outermost(model, within, ""))


def tensors_beside(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that are no part of the language model, those of no module of `beside_language` among
    them."""
    within = _language_modules(model)
    if within is None:
        return set()
    outside = [(name, module) for name, module in model.named_modules() if module not in within]
    known = model.state_dict().keys()
    owned = (f"{name}.{own}".lstrip(".") for name, module in outside for own in _own_tensors(module))
    return {name for name in owned if name in known}


def _is_causal(model: nn.Module) -> bool:
    """Whether its attention is so whatever the configuration says: it does not even note that."""
    return not any(getattr(module, "is_decoder", None) is False for module in model.modules())


def _own_tensors(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def _language_modules(model: PreTrainedModel) -> set[nn.Module] | None:
    """None: all of them are."""
    if model.config.get_text_config() is model.config:
        return None
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {module for part in parts if part is not None for module in part.modules()}


def _outermost(module: nn.Module, within: set[nn.Module], name: str) -> Iterator[str]:
    for own, child in module.named_children():
        if child in within:
            continue
        full = f"{name}.{own}".lstrip(".")
        if any(inner in within for inner in child.modules()):
            yield from _outermost(child, within, full)
        elif next(child.parameters(), None) is not None:
            yield full
