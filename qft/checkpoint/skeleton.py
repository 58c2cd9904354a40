"""A checkpoint's model on the meta device: tensors have shapes and no contents."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.checkpoint.find import Checkpoint
from qft.checkpoint.language import auto_class, text_problem
from qft.checkpoint.limits import require_parameters
from qft.disk import disk_failures
from qft.errors import ModelError, QftError, first_line
from qft.recipe.training import ModelSection


def without_contents(checkpoint: Checkpoint, section: ModelSection, **arguments: Any) -> PreTrainedModel:
    """The model on the meta device, where its tensors have shapes and no contents; `arguments` of from_config.

    Raises ModelError if transformers cannot build it, or its files cannot hold it."""
    try:
        with disk_failures(checkpoint.folder), torch.device("meta"):
            model: PreTrainedModel = auto_class(checkpoint.config).from_config(
                deepcopy(checkpoint.config), trust_remote_code=section.trust_remote_code, **arguments
            )
    except QftError:
        raise
    except Exception as error:  # a configuration is data: whatever is wrong with it, it is the model's
        raise ModelError(f"{checkpoint.path}: {_problem(checkpoint, error)}") from error
    if problem := text_problem(model):
        raise ModelError(f"{checkpoint.path}: {type(model).__name__} {problem}")
    files = checkpoint.weight_files() if checkpoint.has_weights else []
    require_parameters(checkpoint.path, sum(p.numel() for p in model.parameters()), files)
    model.tie_weights()
    return model


def _problem(checkpoint: Checkpoint, error: Exception) -> str:
    config = checkpoint.config
    name = (getattr(config, "architectures", None) or [f"model_type {config.model_type}"])[0]
    if "Unrecognized configuration class" in str(error):
        return f"{name} is not supported: transformers has no model of its kind that writes text"
    return f"{name} cannot be built from its configuration: {first_line(error)}"


def find_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of `count` blocks: of several, that of the decoder, since a tower for images may
    have as many. Raises ModelError if there is none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(name, module) for name, module in lists if len(module) == count]
    if stacks:
        decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
        within = set(decoder.modules()) if decoder is not None else set()
        return next((stack for stack in stacks if stack[1] in within), stacks[0])
    raise ModelError(f"{type(model).__name__}: has no list of {count} blocks to go through one by one")
