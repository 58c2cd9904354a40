"""Which layers are quantized how, and on which rows: everything that is decided before a calibration begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qft.checkpoint.layout import unmergeable
from qft.checkpoint.skeleton import find_blocks, without_contents
from qft.data.calibration import CalibrationData, calibration_data
from qft.data.prepare import Prepared
from qft.documents.plan import CalibrationPart, CalibrationPlanDocument, LayerPart
from qft.errors import ModelError
from qft.machine.device import Device
from qft.plan.model import ModelPlan, plan_model, refuse, require_device
from qft.plan.packages import missing_engine, missing_packages
from qft.quant.engines.llmcompressor import find_problem
from qft.quant.layer import LayerScheme
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.catalogue import CATALOGUE, EngineRow
from qft.recipe.rules import Problem
from qft.recipe.schema import CalibrateSection
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
            data=CalibrationPart(
                audit=rows.audit,
                warnings=list(rows.warnings),
                verify_rows=len(rows.verify),
                sources=list(rows.prepared.sources),
            ),
        )


def plan_calibration(
    loaded: LoadedRecipe, model: ModelPlan | None = None, *, trained: Prepared | None = None
) -> CalibrationPlan:
    """Decide everything. `model` is what is quantized, if it is not the recipe's own; `trained` is the recipe's data
    section as a training has it, if it has been encoded.

    Raises RecipeError for what model or device cannot do; MissingError, DataError, ModelError as the layers below."""
    recipe = loaded.recipe
    refuse(loaded, _problems(recipe, model.device if model else require_device(loaded)))
    # How training holds the base says nothing here: the calibration starts from the unquantized weights.
    unquantized = loaded.having(quant=QuantSection(), adapter=AdapterSection())
    model = model or plan_model(unquantized)
    if model.checkpoint.quantization:
        text = "is already quantized; start from the unquantized model, or from a run whose base is unquantized"
        refuse(loaded, [("model.path", text)])
    calibrate = recipe.calibrate
    assert calibrate is not None
    engine = CATALOGUE[calibrate.engine]
    if engine.by_plugin:
        return _by_plugin(loaded.having(adapter=AdapterSection()), model, trained)
    linears, blocks = linear_layers(model)
    skipped = calibrate.skip_modules
    taken = {name for name in linears if name.startswith(f"{blocks}.") and not _is_skipped(name, skipped)}
    scheme = _scheme(calibrate, [linears[name] for name in taken])
    schemes = {name: scheme if name in taken else None for name in linears}
    refuse(loaded, _layer_problems(calibrate, schemes, linears))
    data = _data(model, recipe, trained, needs_windows=engine.needs_windows(scheme.activations))
    return CalibrationPlan(unquantized, model, schemes, data)


def _by_plugin(loaded: LoadedRecipe, model: ModelPlan, trained: Prepared | None) -> CalibrationPlan:
    """The plan of engine custom; `model` is that of the unquantized model."""
    quantized = plan_model(loaded)
    assert quantized.scheme.plugin is not None
    if unserializable := quantized.scheme.plugin.unserializable(quantized.scheme.config()):
        refuse(loaded, [("quant.plugin", unserializable)])
    return CalibrationPlan(loaded, model, {}, _data(model, loaded.recipe, trained, needs_windows=False), quantized)


def _data(model: ModelPlan, recipe: Recipe, trained: Prepared | None, *, needs_windows: bool) -> CalibrationData:
    decided = recipe.having(data=model.rows_for(recipe.data))
    return calibration_data(decided, model.tokenizer, needs_windows=needs_windows, trained=trained)


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
    if calibrate.data_type == "float" and not _has_float8(device):
        yield "calibrate.data_type", f"{device.name} does not compute in float8; use int, or a GPU of capability 8.9"


def _has_float8(device: Device) -> bool:
    return device.capability is not None and tuple(map(int, device.capability.split("."))) >= FLOAT8_CAPABILITY


def linear_layers(plan: ModelPlan) -> tuple[dict[str, int], str]:
    """Inputs of each linear layer by its name, and the name of the stack of blocks."""
    model = without_contents(plan.checkpoint, plan.recipe.model)
    if reason := unmergeable(plan.checkpoint, model):
        raise ModelError(f"{plan.checkpoint.path}: {reason}")
    linears = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return linears, find_blocks(model, plan.shape.layers)[0]


def _scheme(calibrate: CalibrateSection, inputs: Sequence[int]) -> LayerScheme:
    size: int | str = calibrate.group_size
    if size == "auto":
        fitting = [size for size in GROUPS if all(count % size == 0 for count in inputs)]
        size = next(iter(fitting), GROUPS[0]) if (calibrate.data_type, calibrate.bits) == ("int", 4) else -1
    return LayerScheme(calibrate.data_type, calibrate.bits, int(size), calibrate.symmetric, calibrate.activations)


def _is_skipped(name: str, skipped: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in skipped)


def _layer_problems(
    calibrate: CalibrateSection, schemes: dict[str, LayerScheme | None], linears: dict[str, int]
) -> Iterator[Problem]:
    for end in calibrate.skip_modules:
        if not any(_is_skipped(name, (end,)) for name in linears):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            yield "calibrate.skip_modules", f"{end} is no linear layer (they are called {names})"
    if not any(schemes.values()):
        yield "calibrate.skip_modules", "leaves nothing to quantize"
    for name, scheme in schemes.items():
        if scheme and scheme.group_size > 0 and linears[name] % scheme.group_size:
            text = f"{name} has {linears[name]} inputs, which {scheme.group_size} does not divide: use a smaller group"
            yield "calibrate.group_size", f"{text}, -1, or leave the layer out with calibrate.skip_modules"
            return
