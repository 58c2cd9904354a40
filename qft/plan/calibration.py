"""Which layers are quantized how, and on which rows: everything that is decided before a calibration begins."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.quantizers import base as quantizers

from qft.checkpoint.bypassed import bypassed_linears, deep_linears, initialized_linears
from qft.checkpoint.language import beside_language
from qft.data.calibration import CalibrationData, calibration_data
from qft.data.prepare import Prepared
from qft.documents.plan import CalibrationPart, CalibrationPlanDocument, LayerPart
from qft.machine.device import Device
from qft.plan.limits import answer_problems, length_problem, require_known_tokens, require_special_tokens
from qft.plan.model import ModelPlan, partial_problem, plan_model, refuse, require_device
from qft.plan.modules import Matches, ends_with, match_own
from qft.plan.packages import missing_engine, missing_packages
from qft.quant.engines.llmcompressor import find_problem
from qft.quant.layer import LayerScheme, Settled
from qft.quant.share import Held, count_weights
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.calibration import COMPRESSED
from qft.recipe.catalogue import CATALOGUE, EngineRow
from qft.recipe.schema import CalibrateSection
from qft.recipe.section import Problem
from qft.recipe.training import AdapterSection, QuantSection

GROUPS = (128, 64, 32)
"""Sizes that inference engines have kernels for, the smallest file first."""
FLOAT8_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in float8."""


@dataclass(frozen=True)
class CalibrationPlan:
    """A trained model, and what becomes of it."""

    loaded: LoadedRecipe
    model: ModelPlan
    """Of the unquantized model."""
    schemes: dict[str, LayerScheme | None]
    """Of every linear layer, by its name; None: left in 16 bits. Empty with engine custom, whose plugin decides."""
    data: CalibrationData
    quantized: ModelPlan | None = None
    """The model as engine custom loads it; None with the others."""
    matched: Matches = field(default_factory=dict)
    """Of the names of modules that say what is left in 16 bits, by field: how many each matches."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Of each module outside embeddings and head: see qft.quant.share."""
    settled: Settled | None = None
    """What a training has settled of the layers; None: nothing."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def calibrate(self) -> CalibrateSection:
        assert self.recipe.calibrate is not None
        return self.recipe.calibrate

    @property
    def seed(self) -> int:
        return self.recipe.seed if self.calibrate.seed is None else self.calibrate.seed

    @property
    def engine(self) -> EngineRow:
        return CATALOGUE[self.calibrate.engine]

    @property
    def algorithm(self) -> str | None:
        """None with an engine that has no choice of them."""
        return self.calibrate.algorithm if self.engine.algorithms else None

    def scheme_facts(self) -> dict[str, Any]:
        """How the layers are held, as reports tell it."""
        if self.quantized:
            return self.quantized.scheme.config()
        scheme = next(scheme for scheme in self.schemes.values() if scheme)
        return scheme.facts() | ({"algorithm": self.algorithm} if self.algorithm else {})

    def quantized_share(self, layers: Collection[str]) -> float:
        """Of the weights outside embeddings and head, those of `layers`."""
        return Held.of(self.weights, layers, lambda name: False).share

    def document(self) -> CalibrationPlanDocument:
        """For `qft check --json` and the run folder."""
        rows = self.data
        return CalibrationPlanDocument(
            device=self.model.device_part,
            model=self.model.model_part,
            engine=self.calibrate.engine,
            algorithm=self.algorithm,
            schemes={name: scheme and LayerPart(**scheme.facts()) for name, scheme in self.schemes.items()},
            quantization=self.quantized and self.quantized.quantization_part,
            quantized_share=None if self.quantized else self.quantized_share(_quantized(self.schemes)),
            matched=self.matched,
            data=CalibrationPart(
                audit=rows.audit,
                warnings=list(rows.warnings),
                verify_rows=len(rows.verify),
                sources=list(rows.prepared.sources),
            ),
        )


def plan_calibration(
    loaded: LoadedRecipe,
    model: ModelPlan | None = None,
    *,
    trained: Prepared | None = None,
    settled: Settled | None = None,
) -> CalibrationPlan:
    """Decide everything. `model` is what is quantized, if it is not the recipe's own; `trained` is the recipe's data
    section as a training has it, if it has been encoded; with what is `settled` no calibration windows are looked at.

    Raises RecipeError for what model or device cannot do; MissingError, DataError, ModelError as the layers below."""
    model, layers = plan_layers(loaded, model)
    calibrate = loaded.recipe.calibrate
    assert calibrate is not None
    engine = CATALOGUE[calibrate.engine]
    if engine.by_plugin:
        return _by_plugin(loaded.having(adapter=AdapterSection()), model, trained)
    needs_windows = engine.needs_windows(calibrate.activations) or calibrate.remedy == "distill"
    data = _data(model, loaded, trained, needs_windows=settled is None and needs_windows)
    return CalibrationPlan(
        _unquantized(loaded),
        model,
        layers.schemes,
        data,
        matched=layers.matched,
        weights=layers.weights,
        settled=settled,
    )


@dataclass(frozen=True)
class Layers:
    """What is decided of a model's layers; each field as CalibrationPlan has it."""

    schemes: dict[str, LayerScheme | None] = field(default_factory=dict)
    matched: Matches = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)


def plan_layers(loaded: LoadedRecipe, model: ModelPlan | None = None) -> tuple[ModelPlan, Layers]:
    """The model that is quantized, and how its layers are held: all that a calibration plans without looking at data.
    Raises as `plan_calibration`."""
    recipe = loaded.recipe
    refuse(loaded, _problems(recipe, model.device if model else require_device(loaded)))
    model = model or plan_model(_unquantized(loaded))
    if model.checkpoint.quantization and not model.scheme.keeps_weights:
        text = "is already quantized; set model.dequantize to true, or start from the unquantized model"
        refuse(loaded, [("model.path", text)])
    calibrate = recipe.calibrate
    assert calibrate is not None
    if CATALOGUE[calibrate.engine].by_plugin:
        return model, Layers()
    if CATALOGUE[calibrate.engine].whole_model and model.shape.beside:
        text = f"{calibrate.engine} loads language models alone, and {model.shape.architecture} is more"
        refuse(loaded, [("calibrate.engine", f"{text}; use autoround or rtn")])
    skeleton = model.skeleton
    if mixed := _reads_one_by_one(skeleton, CATALOGUE[calibrate.engine].writes):
        text = f"transformers reads {mixed} of a quantized model one expert at a time, which files of the library's own"
        refuse(loaded, [("calibrate.engine", f"{text} names are not; use torchao, or hand the merged model over")])
    matched, problems = match_own("calibrate.skip_modules", calibrate.skip_modules, skeleton)
    refuse(loaded, problems)
    linears, blocks = model.linears
    if not CATALOGUE[calibrate.engine].whole_model and model.unstreamed:
        refuse(loaded, [("model.path", model.unstreamed)])
    able = {name for name in _plain_linears(skeleton) if name.startswith(f"{blocks}.")} - {*bypassed_linears(skeleton)}
    if calibrate.engine == "bitsandbytes" and calibrate.bits == 8:
        able -= {*deep_linears(skeleton)}
    if not able:
        text = f"no layer of {model.shape.architecture}'s blocks is a torch.nn.Linear, and no other can be quantized"
        refuse(loaded, [("model.path", text)])
    if _packs(calibrate) and not (able := able - {*initialized_linears(skeleton)}):
        text = f"transformers loads no {model.shape.architecture} whose layers hold packed numbers alone"
        refuse(loaded, [("calibrate.activations", f"{text}; set calibrate.preset to w8a8-dynamic")])
    taken = {name for name in able if not _is_skipped(name, calibrate.skip_modules)}
    scheme = _scheme(calibrate, [linears[name] for name in taken])
    schemes = {name: scheme if name in taken else None for name in linears}
    weights = count_weights(skeleton)
    beside = tuple(f"{name}." for name in beside_language(skeleton))
    shares = _share_problems(calibrate, weights, taken, beside)
    refuse(loaded, [*_layer_problems(calibrate, schemes, linears), *shares])
    return model, Layers(schemes, matched, weights)


def _share_problems(
    calibrate: CalibrateSection, weights: Mapping[str, int], taken: Collection[str], beside: tuple[str, ...]
) -> Iterator[Problem]:
    """A model that would be called quantized and is not, for the most part. What begins with `beside` is no part of the
    language model, and stays as it is."""
    if taken and not calibrate.allow_partial:
        kept = calibrate.skip_modules
        held = Held.of(weights, taken, lambda name: _is_skipped(name, kept) or f"{name}.".startswith(beside))
        yield from partial_problem(held, "calibrate", "calibrate.allow_partial")


def _unquantized(loaded: LoadedRecipe) -> LoadedRecipe:
    """How training holds the base says nothing here: a calibration starts from the unquantized weights."""
    return loaded.having(quant=QuantSection(), adapter=AdapterSection())


def _by_plugin(loaded: LoadedRecipe, model: ModelPlan, trained: Prepared | None) -> CalibrationPlan:
    """The plan of engine custom; `model` is that of the unquantized model."""
    quantized = plan_model(loaded)
    assert quantized.scheme.plugin is not None
    if unserializable := quantized.scheme.plugin.unserializable(quantized.scheme.config()):
        refuse(loaded, [("quant.plugin", unserializable)])
    data = _data(model, loaded, trained, needs_windows=False)
    return CalibrationPlan(loaded, model, {}, data, quantized, quantized.matched, count_weights(model.skeleton))


def _data(model: ModelPlan, loaded: LoadedRecipe, trained: Prepared | None, *, needs_windows: bool) -> CalibrationData:
    recipe, shape, tokenizer = loaded.recipe, model.shape, model.tokenizer
    decided = recipe.having(data=model.rows_for(recipe.data))
    data = calibration_data(decided, tokenizer, needs_windows=needs_windows, trained=trained, pictures=model.pictures)
    prepared = data.prepared
    parts = [part for part in (prepared.train, prepared.eval) if part is not None]
    require_known_tokens(parts, prepared.place, tokenizer, shape.embeddings)
    assert recipe.calibrate is not None
    own = "calibrate.max_length"
    for name, longest in (
        (own, max(map(len, data.windows), default=0)),
        (own if recipe.calibrate.data else "data.max_length", max(data.verify["length"])),
    ):
        refuse(loaded, length_problem(name, longest, shape.position_table))
    if recipe.calibrate.accept.score_drop is not None:
        require_special_tokens(tokenizer, shape.embeddings, generates=True)
        refuse(loaded, answer_problems(data.verify, recipe.eval, shape.position_table))
    return data


def _problems(recipe: Recipe, device: Device) -> Iterator[Problem]:
    calibrate = recipe.calibrate
    if calibrate is None:
        yield "calibrate", "there is no such section; add one, if only `calibrate: {preset: w4a16}`"
        return
    yield from missing_engine(calibrate.engine)
    if calibrate.engine_python and (problem := find_problem(calibrate.engine_python)):
        yield "calibrate.engine_python", problem
    if calibrate.accept.score_drop is not None:
        yield from missing_packages(recipe.eval.metrics)
    if calibrate.data_type == "float" and calibrate.bits == 8 and not _has_float8(device):
        yield "calibrate.data_type", f"{device.name} does not compute in float8; use int, or a GPU of capability 8.9"


def _has_float8(device: Device) -> bool:
    return device.capability is not None and tuple(map(int, device.capability.split("."))) >= FLOAT8_CAPABILITY


def _plain_linears(skeleton: nn.Module) -> list[str]:
    """Names of those that are nn.Linear itself: what loads a quantized model leaves subclasses as they are."""
    return [name for name, module in skeleton.named_modules() if type(module) is nn.Linear]


def _reads_one_by_one(skeleton: nn.Module, method: str) -> str | None:
    """The class of experts in whose place transformers puts others where a model is quantized by that method."""
    patched = getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    methods = {name: [str(each.value) for each in own["quantization_methods"]] for name, own in patched.items()}
    classes = dict.fromkeys(type(module).__name__ for module in skeleton.modules())
    return next((name for name in classes if any(own.startswith(method) for own in methods.get(name, ()))), None)


def _packs(calibrate: CalibrateSection) -> bool:
    """Whether layers will hold packed numbers, and no weight."""
    packed = calibrate.bits == 4 or (calibrate.data_type, calibrate.activations) == ("int", "none")
    return packed and CATALOGUE[calibrate.engine].writes == COMPRESSED


def _scheme(calibrate: CalibrateSection, inputs: Sequence[int]) -> LayerScheme:
    size: int | str = calibrate.group_size
    if size == "auto":
        fitting = [size for size in GROUPS if all(count % size == 0 for count in inputs)]
        size = next(iter(fitting), GROUPS[0]) if (calibrate.data_type, calibrate.bits) == ("int", 4) else -1
    return LayerScheme(calibrate.data_type, calibrate.bits, int(size), calibrate.symmetric, calibrate.activations)


def _quantized(schemes: Mapping[str, LayerScheme | None]) -> list[str]:
    return [name for name, scheme in schemes.items() if scheme]


def _is_skipped(name: str, skipped: tuple[str, ...]) -> bool:
    return any(ends_with(name, end) for end in skipped)


def _layer_problems(
    calibrate: CalibrateSection, schemes: dict[str, LayerScheme | None], linears: dict[str, int]
) -> Iterator[Problem]:
    if not any(schemes.values()):
        yield "calibrate.skip_modules", "leaves nothing to quantize"
    for name, scheme in schemes.items():
        if scheme and scheme.group_size > 0 and linears[name] % scheme.group_size:
            text = f"{name} has {linears[name]} inputs, which {scheme.group_size} does not divide: use a smaller group"
            yield "calibrate.group_size", f"{text}, -1, or leave the layer out with calibrate.skip_modules"
            return
