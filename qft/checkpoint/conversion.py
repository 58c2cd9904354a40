"""The tensors of files as a model takes them: since transformers 5 a name on disk need not be that of a module's
parameter, and a parameter may be made of several tensors (the experts of a mixture), or of a part of one.

The rules are transformers' own, in the order of its convert_and_load_state_dict_in_model; here they are applied to one
parameter at a time, and to headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qft.errors import first_line

Tensors = Mapping[str, torch.Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a weight that is not quantized can be held in."""


@dataclass
class Group:
    """Tensors of files that become one of the model's, or several."""

    target: str
    """The first that they become."""
    converter: WeightConverter | None
    """None: the one tensor is taken as it is."""
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Pattern of the converter, and name in the files."""

    def made(self, load: Callable[[str], torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The model's tensors of theirs, by their names. Raises whatever a conversion does."""
        if self.converter is None:
            return {self.target: load(self.parts[0][1])}
        converter = deepcopy(self.converter)
        for pattern, name in self.parts:
            converter.add_tensor(self.target, name, pattern, lambda name=name: load(name))
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class Conversion:
    """What becomes of tensors of the files when `model`, which may be without contents, is loaded from them."""

    def __init__(self, model: PreTrainedModel, stored: Tensors) -> None:
        """`stored` are those tensors by their names, without contents."""
        self.model = model
        self.expected: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.names: dict[int, list[str]] = {}
        """Of each tensor of the model; tied ones have several."""
        for name, value in self.expected.items():
            self.names.setdefault(id(value), []).append(name)
        self.rules = get_model_conversion_mapping(model)
        self.unexpected: dict[str, str] = {}
        """Names in the files that become nothing of the model's, and what they would be called there."""
        self.doubled: list[str] = []
        """Tensors of the model that two of the files would become."""
        self.made: dict[str, torch.Tensor] = {}
        """Tensors of the model as the files have them, without contents."""
        self.failed: dict[str, str] = {}
        """Tensors of the model that cannot be made, and why."""
        self.source: dict[str, Group] = {}
        """What a tensor of the model is made of."""
        for group in self._groups(stored):
            self._make(group, stored)
        self._leave_out_ignored()

    @property
    def used(self) -> list[Any]:
        """The rules that something came under; saving reverses those."""
        return [rule for rule in self.rules if rule.was_used()]

    def twins(self, name: str) -> list[str]:
        """Other names of a tied tensor."""
        return [other for other in self.names[id(self.expected[name])] if other != name]

    @property
    def missing(self) -> list[str]:
        """Tensors of the model that the files do not have, unless a tied one is there or the model's class says that it
        does without."""
        absent = (name for name in self.expected if name not in self.made and name not in self.failed)
        names = {name for name in absent if not any(twin in self.made for twin in self.twins(name))}
        return sorted(_unless_ignored(self.model, missing=names).missing_keys, key=dot_natural_key)

    @property
    def misshapen(self) -> dict[str, tuple[list[int], list[int]]]:
        """Shapes that the files and the model have of a tensor, where they differ."""
        pairs = ((name, list(value.shape), list(self.expected[name].shape)) for name, value in self.made.items())
        return {name: (has, wanted) for name, has, wanted in pairs if has != wanted}

    @property
    def mistyped(self) -> list[str]:
        """Tensors of another kind of number than the model's."""
        kinds = ((name, value.dtype, self.expected[name].is_floating_point()) for name, value in self.made.items())
        return [name for name, dtype, floats in kinds if (dtype not in FLOATS if floats else dtype.is_floating_point)]

    def _groups(self, stored: Iterable[str]) -> Iterator[Group]:
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, groups = self.model.base_model_prefix, dict[str, Group]()
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.expected)
            if target not in self.expected and name in self.expected:
                target, pattern = rename_source_key(name, [], [], prefix, self.expected)
            if target not in self.expected:
                self.unexpected[name] = target
                continue
            group = groups.setdefault(target, Group(target, by_pattern.get(pattern)))
            if group.parts and (pattern is None or group.converter is None):
                self.doubled.append(target)
                continue
            group.parts.append((pattern or name, name))
        yield from groups.values()

    def _make(self, group: Group, stored: Tensors) -> None:
        try:
            made = group.made(lambda name: stored[name], self.model)
        except Exception as error:  # conversions fail in as many ways as there are
            self.failed[group.target] = first_line(error)
            return
        for name, value in made.items():
            if name in self.expected:
                self.made[name], self.source[name] = value, group
            else:
                self.unexpected[group.parts[0][1]] = name

    def _leave_out_ignored(self) -> None:
        left = _unless_ignored(self.model, unexpected=set(self.unexpected.values())).unexpected_keys
        self.unexpected = {name: target for name, target in self.unexpected.items() if target in left}


def _unless_ignored(model: Any, missing: Iterable[str] = (), unexpected: Iterable[str] = ()) -> SimpleNamespace:
    """`missing_keys` and `unexpected_keys` without those that the model's class says nobody need mind."""
    found = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(found)
    return found


def as_saved(model: Any, tensors: Tensors, used: list[Any] | None) -> dict[str, torch.Tensor]:
    """Tensors of a model by the names, and in the shapes, in which save_pretrained writes them. `used` are the rules
    that it was loaded by; None: it was not loaded from safetensors."""
    if used is None:
        model.__dict__.pop("_weight_conversions", None)
    else:
        model._weight_conversions = used
    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return converted
