"""How the weights of a model are written: by the names and in the shapes that save_pretrained gives them, which are
those that its checkpoints are published in, and that other engines read."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from qft.checkpoint.conversion import Conversion, Tensors, as_saved
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.skeleton import find_blocks
from qft.checkpoint.stored import some
from qft.checkpoint.weights import Weights
from qft.errors import ModelError


class Layout:
    """Of the weights `names` of `model`, which may be without contents, in groups: what is outside the stack of `count`
    blocks, then each block."""

    def __init__(self, model: PreTrainedModel, count: int, names: Sequence[str], rules: list[Any] | None) -> None:
        """`rules` as of `as_saved`. Without such a stack all is one group. Raises ModelError if nothing that could be
        written of its groups would load as the model."""
        self.model, self.rules, self.names = model, rules, names
        self.prefix, self.stack = "", nn.ModuleList()
        with suppress(ModelError):
            self.prefix, self.stack = find_blocks(model, count)
        if self._misfit() and rules != []:
            self.rules = []  # by the names of the modules, which transformers takes too
        if misfit := self._misfit():
            text = f"its weights cannot be written one block at a time: {some(misfit)} would not be read again"
            raise ModelError(f"{type(model).__name__}: {text}")

    def groups(self) -> Iterator[list[str]]:
        """Names of what is outside the blocks, then of each block."""
        yield [name for name in self.names if not (self.prefix and name.startswith(f"{self.prefix}."))]
        for number in range(len(self.stack)):
            yield [name for name in self.names if name.startswith(f"{self.prefix}.{number}.")]

    def saved(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The tensors of one group as they are written."""
        made = as_saved(self.model, tensors, self.rules)
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def keep_whole(self) -> None:
        """Take no tensor apart: where any would be, names alone are as in the files."""
        rules = get_model_conversion_mapping(self.model) if self.rules is None else self.rules
        if any(isinstance(rule, WeightConverter) for rule in rules):
            self.rules = [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def saved_with(self, layers: Sequence[str]) -> Callable[[Tensors], dict[str, torch.Tensor]]:
        """The same, for tensors among which those of `layers` have become others, by names within the layer."""
        names = {layer: name for layer in layers if (name := self._saved_layer(layer)) is not None}
        if len(names) < len(layers):
            self.rules = []  # one is a part of something else there, and will never be again
            names = {layer: layer for layer in layers}

        def saved(tensors: Tensors) -> dict[str, torch.Tensor]:
            owners = {name: owner for name in tensors if (owner := _owner(name, names))}
            rest = self.saved({name: tensor for name, tensor in tensors.items() if name not in owners})
            return rest | {names[own] + name.removeprefix(own): tensors[name] for name, own in owners.items()}

        return saved

    def _saved_layer(self, name: str) -> str | None:
        """What the linear layer of that name is called in the files; None: it is not just called otherwise there."""
        weight = self.model.get_submodule(name).weight
        try:
            written = as_saved(self.model, {f"{name}.weight": weight}, self.rules)
        except Exception:  # it takes others with it
            return None
        only, tensor = next(iter(written.items()))
        return only.removesuffix(".weight") if tensor is weight and only.endswith(".weight") else None

    def _misfit(self) -> list[str]:
        """What would not become again what it was."""
        known = self.model.state_dict(keep_vars=True)
        written: dict[str, torch.Tensor] = {}
        try:
            for group in self.groups():
                written |= self.saved({name: known[name].detach().to("meta") for name in group})
        except Exception:  # a rule that has no reverse fails in any way
            return list(self.names)
        again = Conversion(self.model, written)
        return [*again.missing, *again.misshapen, *again.failed, *again.doubled, *again.unexpected]


def _owner(name: str, layers: Container[str]) -> str | None:
    """The layer of `layers` that a tensor belongs to."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((owner for owner in owners if owner in layers), None)


def unmergeable(checkpoint: Checkpoint, model: PreTrainedModel) -> str | None:
    """Why nothing can be merged into the checkpoint, nor it calibrated, block by block; None if it can. `model` is
    without contents. Reads headers."""
    if checkpoint.quantization and not checkpoint.packed:
        remedy = "export --to adapter, or set model.dequantize to true"
        return f"comes quantized, and nothing is merged into such a base: {remedy}"
    if not checkpoint.has_weights:
        return None
    try:
        rules = None if checkpoint.gguf_file else Weights(checkpoint, model).rules
        Layout(model, checkpoint.config.get_text_config().num_hidden_layers, written_names(model), rules)
    except ModelError as error:
        return str(error)
    return None


def written_names(model: nn.Module, *, untied: bool = False, stored: Container[str] = ()) -> list[str]:
    """Of every tensor that is written; of tied ones those that are `stored`, or else the first, unless they are no
    longer the same."""
    known = model.state_dict(keep_vars=True)
    kept = {id(tensor) for name, tensor in known.items() if name in stored}
    first = {id(tensor): name for name, tensor in reversed(list(known.items()))}

    def is_written(name: str, tensor: torch.Tensor) -> bool:
        return name in stored or (first[id(tensor)] == name and id(tensor) not in kept)

    return [name for name, tensor in known.items() if untied or is_written(name, tensor)]
