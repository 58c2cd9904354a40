"""One way to hold the linear layers of a model in few bits while it is trained, evaluated or talked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.quant.dequantize import dequantized_weight
from qft.quant.engines import Block, find_engine, linear_of
from qft.quant.experts import expert_parameters, owner
from qft.quant.hold.plugin import Plugin
from qft.quant.hold.prequantized import checkpoint_problems
from qft.quant.layer import LayerScheme
from qft.quant.product import Store, View
from qft.quant.stacked import Stacked
from qft.recipe import Recipe
from qft.recipe.section import Problem


@dataclass(frozen=True)
class Scheme:
    """A scheme as one model has it. What is here holds for layers of which only other code knows how they are held; a
    file each says what is otherwise."""

    name: str
    """As quant.mode calls it, or the method of a plugin or of a checkpoint that comes quantized."""
    dtype: str
    """Of the weights that are not quantized."""
    skipped: tuple[str, ...] = ()
    """Layers that stay as they are, as transformers matches them: the output heads, and quant.skip_modules."""
    plugin: Plugin | None = None
    """The code of quant.plugin that quantizes."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """The quantization_config of a checkpoint that comes quantized; empty with others."""

    stand_in_class: ClassVar[Any] = ()
    """Of what `stand_in` makes."""
    keeps_weights: ClassVar[bool] = False
    """Whether the layers' weights stay as they are, in 16 or 32 bits."""
    engine: ClassVar[Literal["bitsandbytes"] | None] = None
    """Of `quant.engines`, the one that quantizes a single layer in this way."""

    @property
    def layer(self) -> LayerScheme | None:
        """How a quantized layer is held; None: there is none, or only other code knows."""
        return None

    @property
    def quant_type(self) -> str | None:
        """The data type of few bits, where the scheme has several."""
        return None

    @property
    def learnt_as(self) -> tuple[Any, ...] | None:
        """What a training learns of layers beside their weights; it goes on in a stage that has the same here. None:
        nothing."""
        return None

    @property
    def above_4_bits(self) -> bool:
        """Whether quant.mode could have the weights held in fewer bits than they are."""
        return False

    @property
    def compute_dtype(self) -> str:
        """In which weights are multiplied."""
        return self.dtype

    @property
    def weight_format(self) -> str:
        """What engines call weights that are held so."""
        return self.name

    def short_words(self) -> str:
        """`4 bits (nf4)`"""
        return self.name

    def words(self) -> str:
        """`4bit nf4, double quantization, computed in bfloat16, not lm_head`"""
        return ", ".join([*self.details(), *([f"not {', '.join(self.skipped)}"] if self.skipped else [])])

    def details(self) -> list[str]:
        """Of `words`, what is said of the layers that are held so."""
        return [self.name]

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' quantization config for unquantized weights."""
        return {}

    def facts(self) -> dict[str, Any]:
        """As plain values, for the plan."""
        plugin = asdict(self.plugin) if self.plugin else None
        return {"scheme": self.name, **(self.checkpoint or self.config()), "plugin": plugin}

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of from_pretrained that make it hold the layers so; a checkpoint's own configuration it reads."""
        if self.plugin:
            self.plugin.activate()
        config = {} if self.checkpoint else self.config()
        return {"quantization_config": AutoQuantizationConfig.from_dict(config)} if config else {}

    def settle(self, model: nn.Module) -> None:
        """Bring a loaded model into the state that training and saving rely on. Raises ModelError if it is not held
        so."""
        if self.plugin:
            self.plugin.require_layers(model)

    def misfits(self, model: nn.Module) -> list[str]:
        """Layers of a loaded model whose weights are not what such a layer holds: those of a checkpoint may be
        anything."""
        linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
        own = [
            (name, m) for name, m in linears if is_traceable_wrapper_subclass(getattr(m, "weight", None))
        ]  # torchao's
        return [name for name, m in own if tuple(m.weight.shape) != (m.out_features, m.in_features)]

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        """What of the recipe cannot be trained on weights that are held so."""
        return checkpoint_problems(self.checkpoint, recipe) if self.checkpoint else iter(())

    def unfit(self, model: PreTrainedModel) -> Iterator[Problem]:
        """Why the layers of the unquantized `model` cannot be held so, beside being none of those that are."""
        return iter(())

    def leaving(self, names: Sequence[str]) -> Scheme:
        """The same with these layers left as they are too."""
        return dataclasses.replace(self, skipped=(*self.skipped, *names))

    def quantizes(self, layer: str) -> bool:
        """Whether the linear layer of this name is held in few bits."""
        converts: bool = should_convert_module(layer, list(self.skipped))
        return converts

    def holds(self, model: PreTrainedModel) -> set[str] | None:
        """Modules of the unquantized `model` whose weights are held in few bits; None: only other code knows."""
        if self.engine is None:
            return None
        kept = [*self.skipped, *(model._keep_in_fp32_modules or ())]
        # As transformers' replace_with_bnb_linear has it.
        linears = [name for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
        return {name for name in linears if should_convert_module(name, kept)}

    def learnt_beside(self, model: PreTrainedModel) -> int:
        """Numbers that are trained beside the parameters of `model` and its adapters."""
        return 0

    def holds_experts(self, model: PreTrainedModel) -> set[str]:
        """Parameters of the unquantized `model` that hold the weights of all experts of a layer, and are held in few
        bits; those of a checkpoint that comes quantized are as it has them."""
        if self.engine is None or self.checkpoint:
            return set()
        kept = [*self.skipped, *(model._keep_in_fp32_modules or ())]
        return {name for name in expert_parameters(model) if should_convert_module(owner(name), kept)}

    def stack(self, weight: torch.Tensor) -> Store:
        """The weights [experts, a, b] held in few bits, on their device. Only of schemes with an engine."""
        raise NotImplementedError

    def stacked(self, weight: torch.Tensor) -> nn.Parameter:
        """The same as a parameter, which says that it is of their shape and dtype."""
        store = self.stack(weight)
        return nn.Parameter(Stacked(View(store, weight.dtype, self.product_dtype)), requires_grad=False)

    @property
    def product_dtype(self) -> torch.dtype | None:
        """In which experts' weights are multiplied; None: as what they are multiplied with."""
        return None

    def weight_bytes(self, rows: int, columns: int) -> int | None:
        """What the weight [rows, columns] of a layer that is held so takes on the device, its scales and code books
        included; None: only other code knows."""
        return None

    def stand_in(self, rows: int, columns: int, bias: nn.Parameter | None) -> nn.Linear | None:
        """A layer without contents of the class that holds a weight [rows, columns] so, which allocates what that does;
        None: it stays as it is, or only other code knows."""
        return None

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [rows, columns], quantized and dequantized again on its device. Only of schemes with an engine."""
        assert self.engine is not None
        assert self.layer is not None
        block = Block("", nn.ModuleDict({"layer": linear_of(weight)}), {"layer": self.layer})
        return dequantized_weight(find_engine(self.engine).quantize(block)["layer"].module)
