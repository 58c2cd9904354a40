"""`qft check MODEL`: what qft can do with a model, and why not; asked as a recipe would ask."""

from typing import Any

from qft.documents.abilities import Abilities, Held
from qft.errors import QftError
from qft.model.handover import foreseen_of
from qft.plan import ModelPlan, plan_adapter, plan_layers, plan_model
from qft.recipe import LoadedRecipe
from qft.recipe.catalogue import CATALOGUE, EngineRow
from qft.recipe.load import from_values

MODES = ("4bit", "8bit", "none")
"""Of quant, the fewest bits first."""
USUAL = (("int", 4, "none"), ("nf4", 4, "none"), ("int", 8, "none"))
"""Kinds of layers that an engine is asked for, the first that it makes."""
Adapted = tuple[ModelPlan, dict[str, Any] | None]


def abilities(path: str) -> Abilities:
    """Of the model that `path` names, as model.path would. Reads no weights. Raises MissingError or ModelError for what
    is no model, or none that could be trained."""
    base = from_values({"model": {"path": path}, "data": {"train": "-"}, "output_dir": "-"})
    model = plan_model(base)
    quantized = bool(model.checkpoint.quantization)
    plans = {mode: _tried(_held(base, mode, dequantize=quantized)) for mode in MODES}
    whole = _tried(base.having(adapter={"kind": "none"}))
    as_it_is = f"{model.scheme.name}, as it comes," if quantized else model.dtype
    train = {f"{mode if mode != 'none' else as_it_is} LoRA": _reason(plan) for mode, plan in plans.items()}
    trained = next((plan for plan in plans.values() if not isinstance(plan, str)), None)
    return Abilities(
        path=path,
        model_type=str(model.checkpoint.config.model_type),
        architecture=model.shape.architecture,
        parameters=model.shape.parameters,
        layers=model.shape.layers,
        beside=list(model.shape.beside),
        quantize={mode: _share(plan) for mode, plan in plans.items() if mode != "none"},
        train=train | {"all weights": _reason(whole)},
        exports=foreseen_of(*trained) if trained else {},
        calibrate={name: _calibrated(base, model, row) for name, row in CATALOGUE.items()},
    )


def _held(base: LoadedRecipe, mode: str, *, dequantize: bool) -> LoadedRecipe:
    """`dequantize`: of a checkpoint that comes quantized, whose own way is that of the mode none."""
    if dequantize:
        if mode == "none":
            return base
        base = base.having(model={"dequantize": True})
    return base.having(quant={"mode": mode} | ({"allow_partial": True} if mode != "none" else {}))


def _tried(asked: LoadedRecipe) -> Adapted | str:
    """The plan, or why there is none."""
    try:
        plan = plan_adapter(asked)
        problem = next(iter(plan[0].scheme.problems(asked.recipe)), None)
        return problem[1] if problem else plan
    except QftError as error:
        return _plain(error)


def _reason(plan: Adapted | str) -> str | None:
    return plan if isinstance(plan, str) else None


def _share(plan: Adapted | str) -> Held:
    if isinstance(plan, str):
        return Held(share=None, why_not=plan)
    held = plan[0].held
    return Held(share=held and held.share, partial=bool(held and held.is_partial))


def _calibrated(base: LoadedRecipe, model: ModelPlan, row: EngineRow) -> str | None:
    name = next(name for name, each in CATALOGUE.items() if each is row)
    if row.by_plugin:
        return "needs quant.plugin, whose code decides"
    if row.needs:
        return next(iter(row.needs.values()))
    asked = dict(
        zip(("data_type", "bits", "activations"), next(kind for kind in USUAL if kind in row.makes), strict=True)
    )
    try:
        plan_layers(base.having(calibrate={"engine": name, "allow_partial": True} | asked), model)
    except QftError as error:
        return _plain(error)
    return None


def _plain(error: QftError) -> str:
    """Without the place in a recipe, which there is none of."""
    return str(error).replace("\n", "; ").removeprefix("recipe: ")
