"""Linear layers whose weights other code reads, as the scans of state-space models do: what holds such a weight in few
bits, or adds to the layer's output, would be passed by. And layers that are given more than rows of tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qft.checkpoint.language import beside_language

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
TOKENS = 4
ANSWERS = {"__bool__": True, "item": 1, "__int__": 1, "__index__": 1, "__float__": 1.0, "__contains__": False}
"""What a tensor without contents says of its only element: that nothing is padding, say."""
_KNOWN: dict[Any, tuple[list[str], list[str]]] = {}
"""By what says how a model computes: a plan asks more than once, and a command makes more than one plan."""


class Answering(TorchFunctionMode):
    """Lets a model without contents compute where it asks what its tensors say."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in ANSWERS and args[0].device.type == "meta":
            return ANSWERS[func.__name__]
        if func.__name__.endswith("grouped_mm"):  # which takes bfloat16 alone where there is nothing to compute
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


class _Readers(Answering):
    """Notes which weights are computed with outside the call of their layer. Ends the forward pass once each layer was
    seen in one block."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.owners, self.called, self.found = owners, "", set[str]()
        self.deep = set[str]()
        """Layers that were given more than [rows, tokens, inputs]."""
        self.unseen = set(map(_in_any_block, owners.values()))

    def watch(self, name: str, layer: nn.Module) -> list[Any]:
        """Hooks that tell when the layer is called."""

        def enter(_: nn.Module, args: Sequence[Any]) -> None:
            self.called = name
            if args and args[0].ndim > 3:
                self.deep.add(name)

        def leave(*_: Any) -> None:
            self.called = ""
            self.unseen -= {_in_any_block(name), *map(_in_any_block, self.found)}
            if not self.unseen:
                raise StopIteration

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        # Of what is asked of it, the dtype alone matters: inputs are cast to it, and codes of weights have another.
        if isinstance(result, torch.Tensor | tuple | torch.dtype) and not isinstance(result, torch.Size):
            read = {self.owners.get(id(each), "") for each in [*args, *(kwargs or {}).values()]}
            self.found |= read - {"", self.called}
        return result


def bypassed_linears(model: PreTrainedModel) -> list[str]:
    """Names of such layers, as far as a few tokens through `model`, which is without contents, tell: they may not get
    to its end, so what a layer is in one block it is taken to be in all."""
    return _looked(model)[0]


def deep_linears(model: PreTrainedModel) -> list[str]:
    """Likewise of those that are given more than [rows, tokens, inputs], for which bitsandbytes (0.50) has no
    LLM.int8()."""
    return _looked(model)[1]


def initialized_linears(model: PreTrainedModel) -> list[str]:
    """Names of the layers whose weights the model's own `_init_weights` sets without looking whether they are there, as
    it does with Mamba's `out_proj`. transformers (5.24) calls it where it loads a model, so such layers cannot hold
    packed numbers, beside which there is no weight. `model` is without contents."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    alike = {_in_any_block(name): name for name in linears}
    found = {kind for kind, name in alike.items() if _wants_weight(model, name, linears[name])}
    return [name for name in linears if _in_any_block(name) in found]


def _wants_weight(model: PreTrainedModel, name: str, layer: nn.Linear) -> bool:
    held = layer._parameters
    layer._parameters = {part: each for part, each in held.items() if part != "weight"}
    try:
        for module in (model.get_submodule(name.rpartition(".")[0]), layer):
            model._init_weights(module)
    except AttributeError as error:
        return error.name == "weight"
    finally:
        layer._parameters = held
    return False


def _looked(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    config, modules = model.config, tuple((name, type(module)) for name, module in model.named_modules())
    chosen = (getattr(config, f"_{part}_implementation", None) for part in ("attn", "experts"))
    key = (config.to_json_string(), *chosen, modules)
    if key not in _KNOWN:
        _KNOWN[key] = _look(model)
    return _KNOWN[key]


def _look(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    head, beside = model.get_output_embeddings(), tuple(f"{name}." for name in beside_language(model))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    inside = {name: m for name, m in linears.items() if m is not head and not f"{name}.".startswith(beside)}
    readers = _Readers({id(layer.weight): name for name, layer in inside.items()})
    hooks = [hook for name, layer in inside.items() for hook in readers.watch(name, layer)]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with suppress(Exception), torch.no_grad(), readers:
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    found, deep = (set(map(_in_any_block, names)) for names in (readers.found, readers.deep))
    return [n for n in linears if _in_any_block(n) in found], [n for n in linears if _in_any_block(n) in deep]


def _in_any_block(name: str) -> str:
    return NUMBER.sub("*", name)


def common_ends(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Ends of `names`, as short as they can be for none of `others` to have one of them."""
    ends: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        ends[next((tail for tail in tails if not any(other.endswith(tail) for other in others)), name)] = None
    return list(ends)
