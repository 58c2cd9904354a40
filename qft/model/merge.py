"""A base and the tensors of an adapter -> the weights of the merged model, one block after the other.

The delta is peft's own. Known are LoRA, rsLoRA and DoRA on linear layers, LoRA on the parameters of experts, trained
biases and modules that were saved whole; every other tensor of an adapter is refused.
"""

import copy
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from qft.checkpoint.language import tensors_beside
from qft.checkpoint.layout import Layout, written_names
from qft.checkpoint.skeleton import without_contents
from qft.checkpoint.weights import Weights, open_tensors, save_tensors, write_index
from qft.errors import ModelError
from qft.model.adapter import read_adapter_config
from qft.model.by_block import generation_config
from qft.model.fill import Read
from qft.model.stack_delta import merged_stack, targets
from qft.plan import ModelPlan
from qft.quant.delta import merged
from qft.quant.experts import expert_parameters
from qft.quant.hold import AsPacked, Qat, Scheme
from qft.quant.product import Whole
from qft.recipe.schema import MergeInto

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
UNKNOWN = ("lora_bias", "layer_replication", "use_qalora",
           "use_bdlora", "alora_invocation_tokens", "arrow_config",
           "kasa_config", "monteclora_config", "velora_config", "lora_ga_config")  # fmt: skip
"""Settings of peft.LoraConfig that would change the delta, and that qft does not set."""


class Adapter:
    """The tensors of an adapter in peft's layout, by the names of the base's modules."""

    def __init__(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """`name` is for messages; `config` has the fields of peft.LoraConfig, `tensors` those that peft saves, which
        may be without contents. Raises ModelError for an adapter that is more than LoRA, rsLoRA or DoRA."""
        self.name = name
        other = [field for field in UNKNOWN if config.get(field)]
        if config.get("peft_type") != "LORA" or other:
            kind = ", ".join([str(config.get("peft_type")), *other])
            text = "only LoRA, rsLoRA and DoRA of linear layers can be merged; export --to adapter"
            raise ModelError(f"{name}: is of kind {kind}; {text}")
        self.config = config
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        """Of each linear layer, lora_A [r, in], lora_B [out, r], and lora_magnitude_vector [out] with DoRA; of experts,
        by peft's names, as peft saves them."""
        self.replaced: dict[str, torch.Tensor] = {}
        """Parameters that were trained themselves, by their names in the base."""
        self.rows: dict[str, torch.Tensor] = {}
        """Of modules with a row for each token, those that were trained."""
        for key, tensor in tensors.items():
            self._take(key.removeprefix(PREFIX), tensor)

    def apply(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Weight [out, in] of a linear layer with its delta, in float32."""
        parts = self.deltas[module]
        return merged(
            weight, self._scaling(module), parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        )

    def _scaling(self, module: str) -> float:
        patterns = {field: self.config.get(f"{field}_pattern") or {} for field in ("rank", "alpha")}
        key = {field: get_pattern_key(list(own), module) for field, own in patterns.items()}
        rank: float = patterns["rank"].get(key["rank"], self.config["r"])
        alpha: float = patterns["alpha"].get(key["alpha"], self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def with_rows(self, module: str, table: torch.Tensor) -> torch.Tensor:
        """A table [tokens, ...] with the rows of the module that were trained."""
        asked = self.config["trainable_token_indices"]
        numbers = asked if isinstance(asked, list) else next(own for end, own in asked.items() if module.endswith(end))
        return table.index_copy(0, torch.tensor(numbers), self.rows[module].to(table.dtype))

    def _take(self, key: str, tensor: torch.Tensor) -> None:
        name = key.removesuffix(".weight").removesuffix(".default")
        module, _, part = name.rpartition(".")
        if name.endswith(ROWS):
            self.rows[name.removesuffix(ROWS)] = tensor
        elif part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            self.deltas.setdefault(module, {})[part] = tensor
        elif "lora_" in key:
            raise ModelError(f"{self.name}: holds {key}, which only peft can apply; export --to adapter")
        else:
            own = re.sub(r"(\.base_layer)+\.", ".", key)
            self.replaced[own.replace(".modules_to_save.", ".")] = tensor


def read_adapter(folder: Path) -> Adapter:
    """The adapter in that folder."""
    with open_tensors(folder / "adapter_model.safetensors") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return Adapter(str(folder), read_adapter_config(folder), tensors)


def planned_adapter(plan: ModelPlan, lora: Mapping[str, Any]) -> Adapter:
    """What a training will save, without contents: of the adapter that peft makes of `lora`."""
    model = without_contents(plan.checkpoint, plan.recipe.model)
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(**{**lora, "init_lora_weights": False}))
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return Adapter("the adapter", adapted.peft_config["default"].to_dict() | {"peft_type": "LORA"}, tensors)


class MergedWeights:
    """The weights of the plan's base with the adapter added, in `dtype` on the host, one at a time. `onto` says which
    values of a quantized base: those that training held, or the original ones. None: it is not quantized, or there is
    no adapter."""

    def __init__(self, plan: ModelPlan, adapter: Adapter | Path | None, dtype: str, onto: MergeInto | None) -> None:
        """Reads an adapter that lies in a folder, and nothing of the base. Raises ModelError for an adapter that cannot
        be merged, and for a base whose quantized weights cannot be computed from its files."""
        self.plan, self.dtype = plan, getattr(torch, dtype)
        self.adapter = read_adapter(adapter) if isinstance(adapter, Path) else adapter
        self.model = plan.skeleton
        self.linears = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self.beside = tensors_beside(self.model)
        """Tensors that stay as they are in the files, to the bit, unless the adapter says otherwise."""
        self.scheme = _scheme(plan, onto)
        self.targets = targets(plan, self.adapter.config) if self.adapter else {}
        self.stacks = {target.name: layer for layer, target in self.targets.items()}
        self._require_known_layers()

    def reader(self) -> Read:
        """Opens the base's files: a function from the name of a tensor to its merged value."""
        return partial(self._tensor, self._base())

    def layout(self) -> Layout:
        """How they are written. Opens the base's files."""
        return self._layout(self._base())

    def groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """What is outside the blocks, then each block: tensors by their names in the model."""
        base = self._base()
        return self._groups(base, self._layout(base))

    def write(self, folder: Path) -> None:
        """One safetensors file for each block and one for the rest, configuration, tokenizer and the model's code.
        Raises ModelError if the model cannot be written so that it would load."""
        base = self._base()
        layout = self._layout(base)
        for number, tensors in enumerate(self._groups(base, layout), start=-1):
            name = "model-outside" if number < 0 else f"model-block-{number:05}"
            save_tensors(layout.saved(tensors), folder / f"{name}.safetensors")
        write_index(folder)
        self.config.save_pretrained(folder)
        generation_config(self.plan).save_pretrained(folder)
        self.plan.checkpoint.save_reader(self.plan.tokenizer, folder)
        if self.plan.recipe.model.trust_remote_code:
            for path in self.plan.checkpoint.folder.glob("*.py"):
                shutil.copyfile(path, folder / path.name)

    @cached_property
    def config(self) -> Any:
        """The configuration of the merged model."""
        config = copy.deepcopy(self.model.config)
        config.dtype, config.architectures = self.dtype, [self.plan.shape.architecture]
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) and not self.unties
        return config

    @cached_property
    def known(self) -> dict[str, torch.Tensor]:
        """Every tensor of the model, without contents; tied ones by each of their names."""
        return dict(self.model.state_dict(keep_vars=True))

    @cached_property
    def experts(self) -> set[str]:
        """Parameters that hold the experts of a layer."""
        return set(expert_parameters(self.model))

    @cached_property
    def names(self) -> list[str]:
        """Of every tensor that is written; of tied ones the first."""
        return written_names(self.model, untied=self.unties)

    @cached_property
    def unties(self) -> bool:
        """Whether the adapter trained one of two tied weights, which are then no longer the same."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        if self.adapter is None or ends[0].weight is not ends[1].weight:
            return False
        shared = {name for name, module in self.model.named_modules() if module in ends}
        touched = {name.rpartition(".")[0] for name in self.adapter.replaced} | self.adapter.deltas.keys()
        return bool(shared & touched) or shared <= self.adapter.rows.keys()

    @cached_property
    def quantized(self) -> set[str]:
        """Modules whose weights training held in few bits."""
        return (self.scheme and self.scheme.holds(self.model)) or set()

    @cached_property
    def quantized_experts(self) -> set[str]:
        """Parameters of experts that it held so."""
        return self.scheme.holds_experts(self.model) if self.scheme else set()

    @property
    def folder_bytes(self) -> int:
        """What `write` needs: the weights, and 16 MiB that stand for everything else."""
        numbers = sum(self.known[name].numel() for name in self.names)
        return int(numbers * self.dtype.itemsize) + 2**24

    def _base(self) -> Weights:
        return Weights(self.plan.checkpoint.with_weights(), self.model)

    def _layout(self, base: Weights) -> Layout:
        names = written_names(self.model, untied=self.unties, stored=base.conversion.source)
        return Layout(self.model, self.plan.shape.layers, names, base.rules)

    def _groups(self, base: Weights, layout: Layout) -> Iterator[dict[str, torch.Tensor]]:
        for names in layout.groups():
            yield {name: self._tensor(base, name) for name in names}

    def _tensor(self, base: Read, name: str) -> torch.Tensor:
        meta = self.known[name]
        module, _, kind = name.rpartition(".")
        if self.adapter and name in self.adapter.replaced:
            return self._cast(self.adapter.replaced[name], meta)
        if name in self.beside and not (self.adapter and module in self.adapter.deltas):
            return self._found(base, name).contiguous()
        value = self._source(base, name)
        if value.shape != meta.shape:
            raise ModelError(f"{self.plan.checkpoint.path}: {name} is {list(value.shape)}, not {list(meta.shape)}")
        if name in self.experts:
            return self._merged_stack(name, value)
        if kind != "weight":
            return self._cast(value, meta)
        if rows := self._rows(name):
            value = rows(value)
        transposed = isinstance(self.linears.get(module), Conv1D)  # whose weight is [in, out]
        value = self._trained(module, value.T.contiguous() if transposed else value)
        return self._cast(value.T if transposed else value, meta)

    def _rows(self, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What puts the trained rows of single tokens into the weight of that name; None: there are none."""
        if self.adapter is None:
            return None
        twins = [name] if self.unties else [twin for twin, meta in self.known.items() if meta is self.known[name]]
        modules = [twin.rpartition(".")[0] for twin in twins]
        return next((partial(self.adapter.with_rows, own) for own in modules if own in self.adapter.rows), None)

    def _trained(self, module: str, value: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] of a module as training held it, with its delta."""
        if self.scheme and module in self.quantized:
            # On the same kind of device.
            value = self.scheme.round_trip(value.to(self.plan.device.kind)).cpu()
        if isinstance(self.plan.scheme, Qat):
            value = value.to(self.plan.device.kind)  # likewise
        return self.adapter.apply(module, value) if self.adapter and module in self.adapter.deltas else value

    def _merged_stack(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Of experts [experts, a, b]."""
        held = self.scheme and name in self.quantized_experts
        store = self.scheme.stack(value.to(self.plan.device.kind)) if self.scheme and held else Whole(value)
        layer = self.stacks.get(name)
        delta = self.targets[layer].factors(self.adapter.deltas[layer]) if self.adapter and layer else None
        return merged_stack(value, store.reader(value.dtype), delta, self.dtype)

    def _found(self, base: Read, name: str) -> torch.Tensor:
        """The original weight; of tied ones, whichever the files have."""
        try:
            return base(name)
        except ModelError:
            twins = [twin for twin, meta in self.known.items() if meta is self.known[name] and twin != name]
            if not twins:
                raise
            return base(twins[0])

    def _source(self, base: Read, name: str) -> torch.Tensor:
        """The same in the dtype in which the base was loaded."""
        value = self._found(base, name)
        return value.to(getattr(torch, self.plan.dtype)) if value.is_floating_point() else value

    def _cast(self, value: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        return value.cpu().to(self.dtype if meta.is_floating_point() else value.dtype).contiguous()

    def _require_known_layers(self) -> None:
        if self.adapter is None:
            return
        strange = [name for name in self.adapter.deltas if name not in self.targets and name not in self.linears]
        owned = (*self.adapter.replaced, *(f"{module}.weight" for module in self.adapter.rows))
        strange += [name for name in owned if name not in self.known]
        if strange:
            text = "which is no linear layer of the base and cannot be merged; export --to adapter"
            raise ModelError(f"{self.adapter.name}: changes {strange[0]}, {text}")


def _scheme(plan: ModelPlan, onto: MergeInto | None) -> Scheme | None:
    """How training held the base's linear layers, if the result is to hold the same values."""
    if plan.checkpoint.quantization and not plan.checkpoint.packed:
        text = "comes quantized, and nothing is merged into such a base: export --to adapter"
        raise ModelError(f"{plan.checkpoint.path}: {text}")
    if isinstance(plan.scheme, AsPacked):
        if onto == "original":
            text = "its files hold quantized weights, and no original ones: leave out --merge-into"
            raise ModelError(f"{plan.checkpoint.path}: {text}")
        return None  # what is read of it is what it holds
    if onto != "dequantized":
        return None
    if plan.scheme.engine:
        return plan.scheme
    raise ModelError(
        f"{plan.checkpoint.path}: is held by {plan.scheme.name}, whose values only its own code can dequantize: merge "
        "into the original weights (--merge-into original), or export --to adapter"
    )
