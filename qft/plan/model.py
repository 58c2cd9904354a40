"""Which model, where, and in how few bits: everything about a model that is decided before it is loaded.

Nothing here loads a weight: the model is built on the meta device, where tensors have shapes and no contents.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from qft.checkpoint.find import Checkpoint, find_checkpoint, load_tokenizer, require_written
from qft.checkpoint.skeleton import without_contents
from qft.documents.manifest import DevicePart
from qft.documents.plan import PlannedModel, Quantization
from qft.errors import RecipeError
from qft.machine.device import Device, find_device
from qft.quant.hold import Scheme, contradictions, find_scheme
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.load import from_values
from qft.recipe.rules import Problem
from qft.recipe.training import DataSection, ModelSection, QuantSection

MAX_LENGTH = 2048
"""Of a row, in tokens, where nobody says and the model takes as many."""


@dataclass(frozen=True)
class Shape:
    """What the model is made of, counted without its weights."""

    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    linear_parameters: int
    """Weights of the linear layers that quantization applies to (all but the output head)."""
    trainable_parameters: int
    max_positions: int | None
    """Longest sequence, in tokens, that the model was built for."""
    heads: tuple[str, ...]
    """Names of the output head."""


@dataclass(frozen=True)
class ModelPlan:
    """What `qft.model.load.load_base` needs to know."""

    loaded: LoadedRecipe
    device: Device
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    dtype: str
    """Of the weights that are not quantized."""
    scheme: Scheme
    """How its linear layers are held."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def longest_row(self, data: DataSection) -> int:
        """data.max_length, in tokens, as it is decided for this model."""
        if data.max_length != "auto":
            return data.max_length
        return min(self.shape.max_positions or MAX_LENGTH, MAX_LENGTH)

    def rows_for(self, data: DataSection) -> DataSection:
        """The section with its max_length decided."""
        return data.having(max_length=self.longest_row(data))

    @property
    def device_part(self) -> DevicePart:
        return DevicePart(**asdict(self.device))

    @property
    def model_part(self) -> PlannedModel:
        checkpoint = self.checkpoint
        return PlannedModel(path=checkpoint.path, commit=checkpoint.commit, dtype=self.dtype, **asdict(self.shape))

    @property
    def quantization_part(self) -> Quantization:
        return Quantization(**self.scheme.facts() | {"described": self.scheme.words()})


def plan_model(loaded: LoadedRecipe, lora: dict[str, Any] | None = None, *, fresh: bool = False) -> ModelPlan:
    """Decide device, dtype and quantization, and count the parameters, with the adapters of `lora` attached. `fresh`:
    the model was written by this command, which will judge it.

    Raises RecipeError for what model or device cannot do, MissingError or ModelError if the model is not to be had,
    DamagedError if an earlier command wrote it, and it is no longer that."""
    recipe = loaded.recipe
    device = require_device(loaded)
    refuse(loaded, device_problems(recipe, device))
    if not fresh:
        require_written(recipe)
    checkpoint = find_checkpoint(recipe)
    if checkpoint.quantization:
        refuse(loaded, contradictions(checkpoint.quantization, loaded))
    dtype = _dtype(recipe, device)
    shape = _shape(loaded, checkpoint, lora)
    tokenizer = load_tokenizer(checkpoint, recipe)
    scheme = find_scheme(recipe.quant, checkpoint.quantization, dtype, shape.heads)
    return ModelPlan(loaded, device, checkpoint, tokenizer, shape, dtype, scheme)


def refuse(loaded: LoadedRecipe, problems: Iterable[Problem]) -> None:
    """Raise RecipeError with all `problems`, each at its place in the recipe."""
    found = [loaded.problem(field, text) for field, text in problems]
    if found:
        raise RecipeError(found)


def require_device(loaded: LoadedRecipe) -> Device:
    """The device that model.device asks for. Raises RecipeError if there is none."""
    device = find_device(loaded.recipe.model.device)
    if device is None:
        text = "this torch sees no CUDA device; set it to auto or cpu, or install a CUDA build of torch"
        raise RecipeError(loaded.problem("model.device", text))
    return device


def device_problems(recipe: Recipe, device: Device) -> Iterator[Problem]:
    """What the model and quant sections ask and the device cannot do."""
    model, attention = recipe.model, recipe.model.attn_implementation
    if not device.bf16:
        remedy = f"{device.name} has no bfloat16; use float16 or float32"
        if model.dtype == "bfloat16":
            yield "model.dtype", remedy
        if recipe.quant.compute_dtype == "bfloat16":
            yield "quant.compute_dtype", remedy
    if device.kind == "cpu" and attention.startswith("flash"):
        yield "model.attn_implementation", f"{attention} needs a GPU; use sdpa"
    elif attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield "model.attn_implementation", "flash-attn is not installed; pip install flash-attn, or use sdpa"


def _dtype(recipe: Recipe, device: Device) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    # An update is far smaller than its weight: in 16 bits most of it would be rounded away.
    if recipe.adapter.kind == "none":
        return "float32"
    return "bfloat16" if device.bf16 else "float16"


def plan_folder(folder: Path, section: ModelSection, dtype: str, quant: QuantSection | None = None) -> ModelPlan:
    """The plan of a model that was written to `folder`, where and how `section` says its base is held."""
    model = section.model_dump(exclude={"path", "revision"}) | {"path": str(folder.resolve()), "dtype": dtype}
    values = {"model": model, "data": {"train": "-"}, "output_dir": "-"}
    values |= {"quant": quant.model_dump(exclude_unset=True)} if quant else {}
    return plan_model(from_values(values), fresh=True)


def _shape(loaded: LoadedRecipe, checkpoint: Checkpoint, lora: dict[str, Any] | None) -> Shape:
    """Build the model without contents, attach the adapters, and count."""
    config = checkpoint.config
    model = without_contents(checkpoint, loaded.recipe.model, dtype=torch.float32)
    head = model.get_output_embeddings()
    heads = tuple(name for name, module in model.named_modules() if module is head)
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in heads]
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())  # before there are adapters
    return Shape(
        architecture=type(model).__name__,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        parameters=parameters,
        linear_parameters=sum(module.weight.numel() for module in linears),
        trainable_parameters=_trainable(loaded, model, lora) if lora else parameters,
        max_positions=getattr(text, "max_position_embeddings", None),
        heads=heads,
    )


def _trainable(loaded: LoadedRecipe, model: nn.Module, lora: dict[str, Any]) -> int:
    """Trainable parameters once the adapters are attached. Raises RecipeError if they fit nowhere."""
    names = sorted({n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)})
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**lora | {"init_lora_weights": False}))
    except (ValueError, KeyError) as error:
        text = f"{str(error).splitlines()[0]} (the linear layers are called {', '.join(names)})"
        raise RecipeError(loaded.problem("adapter.target_modules", text)) from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
