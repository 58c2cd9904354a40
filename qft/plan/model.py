"""Which model, where, and in how few bits: everything about a model that is decided before it is loaded.

Nothing here loads a weight: the model is built on the meta device, where tensors have shapes and no contents.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qft.checkpoint.find import Checkpoint, find_checkpoint, load_tokenizer, require_written
from qft.checkpoint.language import beside_language
from qft.checkpoint.layout import unmergeable
from qft.checkpoint.passing import passing_problem
from qft.checkpoint.require import require_weights
from qft.checkpoint.skeleton import find_blocks, without_contents
from qft.data.pictures import Pictures
from qft.documents.manifest import DevicePart
from qft.documents.plan import PlannedModel, Quantization
from qft.errors import ModelError, RecipeError
from qft.machine.device import Device, find_device
from qft.plan.experts import Experts, expert_problems, plan_experts, set_balance
from qft.plan.holding import output_heads, plain_dtype, scheme_of, weights_held
from qft.plan.limits import table_of_positions
from qft.plan.modules import Matches, is_all_linear, match_adapter, match_skips, whole_problems
from qft.plan.shape import Shape
from qft.plan.targets import Excluded, exclusion, lost_problems, rank_problems, size_problems
from qft.plan.template import set_template, template_problems
from qft.plan.token_rows import not_adapted, rounded_rows, row_arguments, row_problems, with_added
from qft.quant.experts import owner
from qft.quant.hold import Scheme, contradictions
from qft.quant.share import Held
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.data import DataSection
from qft.recipe.load import from_values
from qft.recipe.section import Problem
from qft.recipe.training import OF_FILES, ModelSection, QuantSection

MAX_LENGTH = 2048
"""Of a row, in tokens, where nobody says and the model takes as many."""


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
    matched: Matches
    """Of the names of modules that the recipe gives, by field: how many each matches."""
    held: Held | None
    """Of its weights, what the scheme holds in few bits; None: only other code knows."""
    unadapted: Excluded = None
    """What gets no adapter, as peft reads it."""
    experts: Experts | None = None
    """None: it has none, or gets no adapters."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without contents, made once: to be looked at, and never changed."""
        return without_contents(self.checkpoint, self.recipe.model)

    @property
    def recomputes(self) -> bool:
        """Whether transformers can compute its blocks again for the backward pass (gradient checkpointing)."""
        return bool(self.skeleton.supports_gradient_checkpointing)

    def by(self, loaded: LoadedRecipe) -> "ModelPlan":
        """The same by a recipe whose model section is the same, and with the same skeleton."""
        made = replace(self, loaded=loaded)
        vars(made).update({"skeleton": self.skeleton} if "skeleton" in vars(self) else {})
        return made

    @property
    def pictures(self) -> Pictures | None:
        """What reads the images of rows; None: the model is one of text alone."""
        found = self.checkpoint
        if not self.shape.beside or found.gguf_file:
            return None
        return Pictures(found.folder, self.tokenizer, self.dtype, self.recipe.model.trust_remote_code)

    def skeleton_in_dtype(self) -> PreTrainedModel:
        """The same with its weights in `dtype`, as it is loaded where nothing is quantized."""
        dtype = getattr(torch, self.dtype)
        model = without_contents(self.checkpoint, self.recipe.model, dtype=dtype, **self.attention)
        set_balance(self.recipe, model)
        return model

    @property
    def attention(self) -> dict[str, str]:
        """Which one transformers is told to take; empty: it may choose. Left to itself, 5.17 takes sdpa for scores that
        are capped, and leaves the cap out."""
        asked = self.recipe.model.attn_implementation
        if asked == "auto" and caps_scores(self.checkpoint.config):
            asked = "eager"
        return {} if asked == "auto" else {"attn_implementation": asked}

    @cached_property
    def linears(self) -> tuple[dict[str, int], str]:
        """Inputs of each linear layer by its name, and the name of the stack of blocks. Raises ModelError if the model
        cannot be gone through block by block."""
        if reason := unmergeable(self.checkpoint, self.skeleton):
            raise ModelError(f"{self.checkpoint.path}: {reason}")
        linears = {name: m.in_features for name, m in self.skeleton.named_modules() if isinstance(m, nn.Linear)}
        return linears, find_blocks(self.skeleton, self.shape.layers)[0]

    @cached_property
    def unstreamed(self) -> str | None:
        """Why its blocks cannot be run one at a time, as `passing_problem` tells."""
        return passing_problem(self.skeleton, find_blocks(self.skeleton, self.shape.layers)[1])

    def longest_row(self, data: DataSection) -> int:
        """data.max_length, in tokens, as it is decided for this model."""
        if data.max_length != "auto":
            return data.max_length
        return min(self.shape.max_positions or MAX_LENGTH, MAX_LENGTH)

    def rows_for(self, data: DataSection) -> DataSection:
        """The section with its max_length decided."""
        return data.having(max_length=self.longest_row(data))

    @property
    def held_in_part(self) -> str | None:
        """What to say of a base that is called quantized and is not, for the most part."""
        return self.held.words() if self.held and self.held.is_partial and self.scheme.name != "none" else None

    @property
    def device_part(self) -> DevicePart:
        return DevicePart(**asdict(self.device))

    @property
    def model_part(self) -> PlannedModel:
        checkpoint = self.checkpoint
        return PlannedModel(
            path=checkpoint.path,
            commit=checkpoint.commit,
            dtype=self.dtype,
            added_tokens=checkpoint.added.ids if checkpoint.added else {},
            **asdict(self.shape),
        )

    @property
    def quantization_part(self) -> Quantization:
        share = self.held.share if self.held else None
        return Quantization(**self.scheme.facts() | {"described": self.scheme.words(), "quantized_share": share})


def plan_model(
    loaded: LoadedRecipe,
    lora: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    device: Device | None = None,
    adapted: bool = False,
) -> ModelPlan:
    """Decide device (this machine's, where none is given), dtype and quantization, and count the parameters, with the
    adapters of `lora` attached. `fresh`: the model was written by this command, which will judge it; `adapted`: it will
    get an adapter that there is already.

    Raises RecipeError for what model or device cannot do, MissingError or ModelError if the model is not to be had,
    DamagedError if an earlier command wrote it, and it is no longer that."""
    recipe = loaded.recipe
    device = device or require_device(loaded)
    refuse(loaded, device_problems(recipe, device))
    if not fresh:
        require_written(recipe)
    checkpoint = find_checkpoint(recipe, adapted=adapted or lora is not None)
    if checkpoint.quantization:
        refuse(loaded, contradictions(checkpoint.quantization, loaded))
    refuse(loaded, attention_problems(recipe, checkpoint.config))
    dtype = plain_dtype(recipe.model, device, whole=recipe.adapter.kind == "none")
    model = without_contents(checkpoint, recipe.model, dtype=torch.float32)
    idle = require_weights(checkpoint, model, recipe)
    refuse(loaded, [("model.ignore_unexpected", f"{p!r} fits no tensor that would be unexpected") for p in idle])
    matched = _matched(loaded, model, lora)
    refuse(loaded, expert_problems(recipe, model) if lora else ())
    unadapted = exclusion(recipe.adapter, model) if lora else None
    tokenizer = load_tokenizer(checkpoint, recipe)
    checkpoint, model, problems = with_added(recipe.model, checkpoint, tokenizer, model)
    refuse(loaded, [*problems, *template_problems(tokenizer, recipe.data)])
    set_template(tokenizer, recipe.data)
    lora = lora and lora | {"exclude_modules": unadapted} | row_arguments(recipe.adapter, checkpoint.added, model)
    scheme = scheme_of(recipe, device, checkpoint, model)
    refuse(loaded, [*scheme.unfit(model), *rounded_rows(scheme, lora, recipe.model, model)])
    experts = plan_experts(recipe, model) if lora else None
    lora = experts.arguments(lora) if lora and experts else lora
    if lora:
        held_layers = (scheme.holds(model) or set()) | {owner(name) for name in scheme.holds_experts(model)}
        refuse(loaded, whole_problems(recipe.adapter, held_layers))
    held = weights_held(scheme, recipe, model)
    beside = scheme.learnt_beside(model)
    shape = _shape(loaded, model, lora, matched)
    shape = replace(shape, trainable_parameters=shape.trainable_parameters + beside)
    if lora:
        refuse(loaded, size_problems(shape.trainable_parameters, device))
    return ModelPlan(loaded, device, checkpoint, tokenizer, shape, dtype, scheme, matched, held, unadapted, experts)


def partial_problem(held: Held | None, field: str, allow: str) -> Iterator[Problem]:
    """Yield what is wrong at `field` if far less is held than one would think, unless the field `allow` says so."""
    if held and held.is_partial:
        yield field, f"{held.words()}: set {allow} to true if that is meant"


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


def caps_scores(config: PretrainedConfig) -> bool:
    """Whether attention squashes its scores (Gemma 2), which torch's own does not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def attention_problems(recipe: Recipe, config: PretrainedConfig) -> Iterator[Problem]:
    """What model.attn_implementation asks and the model cannot have."""
    if recipe.model.attn_implementation == "sdpa" and caps_scores(config):
        yield "model.attn_implementation", "sdpa leaves out the soft cap of this model's scores; use eager"


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


def plan_folder(folder: Path, section: ModelSection, dtype: str, quant: QuantSection | None = None) -> ModelPlan:
    """The plan of a model that was written to `folder`, where and how `section` says its base is held."""
    model = section.model_dump(exclude={*OF_FILES, "dequantize"}) | {
        "path": str(folder.resolve()),
        "dtype": dtype,
    }
    values = {"model": model, "data": {"train": "-"}, "output_dir": "-"}
    values |= {"quant": quant.model_dump(exclude_unset=True)} if quant else {}
    return plan_model(from_values(values), fresh=True)


def _matched(loaded: LoadedRecipe, model: nn.Module, lora: dict[str, Any] | None) -> Matches:
    """What names of modules match, those of the adapter too if there are to be adapters. Raises RecipeError for those
    that match nothing."""
    matches, problems = match_skips(loaded.recipe, model)
    if lora:
        others, more = match_adapter(loaded.recipe.adapter, model)
        matches, problems = matches | others, [*problems, *more]
    refuse(loaded, problems)
    return matches


def _shape(loaded: LoadedRecipe, model: PreTrainedModel, lora: dict[str, Any] | None, matched: Matches) -> Shape:
    """Count what the skeleton is made of, and what of it is trained once adapters are attached to it."""
    head, beside = model.get_output_embeddings(), tuple(f"{name}." for name in beside_language(model))
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not f"{name}.".startswith(beside)
    ]
    text, table = model.config.get_text_config(), table_of_positions(model)
    built_for = [length for length in (getattr(text, "max_position_embeddings", None), table) if length]
    parameters = sum(p.numel() for p in model.parameters())  # before there are adapters
    return Shape(
        architecture=type(model).__name__,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        parameters=parameters,
        linear_parameters=sum(module.weight.numel() for module in linears),
        trainable_parameters=_trainable(loaded, model, lora, matched) if lora else parameters,
        max_positions=min(built_for, default=None),
        position_table=table,
        embeddings=model.get_input_embeddings().weight.shape[0],
        heads=output_heads(model),
        beside=tuple(beside_language(model)),
    )


def _trainable(loaded: LoadedRecipe, model: nn.Module, lora: dict[str, Any], matched: Matches) -> int:
    """Trainable parameters once the adapters are attached; how many modules `all-linear` is goes into `matched`. Raises
    RecipeError if they cannot be."""
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**lora | {"init_lora_weights": False}))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RecipeError(loaded.problem("adapter.target_modules", not_adapted(error))) from error
    if is_all_linear(lora["target_modules"]):
        tuners = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        count = sum(not isinstance(module, ParamWrapper) for module in tuners)
        matched["adapter.target_modules"] = {lora["target_modules"]: count}
    problems = [*rank_problems(loaded.recipe.adapter, adapted), *lost_problems(adapted), *row_problems(adapted)]
    refuse(loaded, problems)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
