"""Forms that a run can be handed over in, and what keeps it from each: told of recipe, skeleton, tokenizer and adapter,
by the same rules before the training, when no weight has been loaded, and in the export."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

from qft.checkpoint.layout import unmergeable
from qft.data.prepare import Prepared
from qft.errors import ModelError, QftError, RecipeError, first_line
from qft.gguf.llamacpp import KINDS, end_tokens
from qft.model.by_block import generation_config
from qft.model.merge import Adapter, MergedWeights, planned_adapter
from qft.plan import ModelPlan, Plan, plan_calibration, plan_layers, refuse
from qft.quant.hold import Qat
from qft.quant.hold.none import Unquantized
from qft.quant.layer import Settled
from qft.recipe import LoadedRecipe
from qft.recipe.catalogue import export_problem
from qft.recipe.schema import CalibrateSection, ExportTarget, MergeInto

Packages = tuple[tuple[str, str], ...]
"""Names of modules, each with the extra of qft that installs it."""
LLAMACPP: Packages = (("cyllama", "llamacpp"),)


@dataclass(frozen=True)
class Form:
    """What handing over in one form is and takes."""

    merges: bool = True
    """Whether the adapter is added to weights."""
    after: str | None = None
    """The form that it is made from, or shares all but the size of blocks with: what keeps a run from that one keeps it
    from this one too."""
    regrids: bool = False
    """Whether weights are rounded to the 4-bit grid that a 4-bit base came from: a small delta on top of it is lost."""
    rounding: CalibrateSection | None = None
    """How the merged weights are quantized again, if they are."""
    calibrated: bool = False
    """Whether the recipe's `calibrate` takes the place of `rounding`."""
    kind: str | None = None
    """Of GGUF file."""
    needs: Packages = ()
    """What writing it takes beside qft's own dependencies."""
    gate_needs: Packages = ()
    """What loading it again takes besides."""


def _gguf(kind: str) -> Form:
    made_by = LLAMACPP if KINDS[kind].by_llamacpp else ()
    after = "merged" if kind == "f16" else "gguf-f16"
    return Form(after=after, kind=kind, needs=(("gguf", "gguf"), *made_by), gate_needs=LLAMACPP)


def _rounded(section: CalibrateSection, **more: Any) -> Form:
    return Form(after="merged", rounding=section, **more)


FORMS: dict[str, Form] = {
    "adapter": Form(merges=False),
    "merged": Form(),
    "bnb-4bit": _rounded(CalibrateSection(engine="bitsandbytes", data_type="nf4"), regrids=True),
    "bnb-8bit": _rounded(CalibrateSection(engine="bitsandbytes", bits=8, activations="dynamic")),
    "compressed-tensors": _rounded(
        CalibrateSection(engine="rtn"), calibrated=True, needs=(("compressed_tensors", "calibrate"),)
    ),
    "torchao": _rounded(CalibrateSection(engine="torchao", bits=8), needs=(("torchao", "calibrate"),)),
    "gguf": _gguf("q8_0"),
    **{name: _gguf(name.removeprefix("gguf-")) for name in get_args(ExportTarget) if name.startswith("gguf-")},
}
"""By the names of export.target."""


@dataclass(frozen=True)
class Handover:
    """A run, finished or still to be trained."""

    loaded: LoadedRecipe
    plan: ModelPlan
    """Of the base as it is trained on, or of the full model."""
    read_adapter: Callable[[], Adapter | None]
    """Raises ModelError for one that cannot be merged."""
    asked: Literal["auto", MergeInto]
    """Base weights to add the adapter to."""
    merge_into: MergeInto | None
    """The same, decided. None: there is no adapter, or its base is not quantized."""

    @property
    def dtype(self) -> str:
        """In which the run multiplies its weights."""
        return self.plan.dtype if self.plan.checkpoint.quantization else self.plan.scheme.compute_dtype

    @cached_property
    def weights(self) -> MergedWeights:
        """What of the merged model is known without reading its base. Raises ModelError for what cannot be merged."""
        return MergedWeights(self.plan, self.read_adapter(), self.dtype, self.merge_into)

    @cached_property
    def merged(self) -> ModelPlan:
        """The merged model, before it is quantized again."""
        return replace(self.plan, dtype=self.dtype, scheme=Unquantized("none", self.dtype))

    @cached_property
    def gguf_tensors(self) -> Mapping[str, tuple[int, ...]]:
        """`writable_tensors` of the merged model."""
        from qft.gguf.file import writable_tensors

        return writable_tensors(self.weights.config, self.plan.tokenizer, end_tokens(generation_config(self.plan)))

    @cached_property
    def converter(self) -> Path | None:
        """Folder of llama.cpp's converter, if that writes the file of the merged model; None: qft does. Raises
        ModelError if neither can."""
        from qft.gguf.converter import INSTALL, architecture_problem, converter_problem

        asked, path = self.loaded.recipe.export.converter, self.loaded.recipe.export.converter_path
        if asked != "llama.cpp":
            try:
                self.gguf_tensors  # noqa: B018  # which raises
            except ModelError as error:
                if asked == "qft" or isinstance(self.plan.scheme, Qat):
                    raise
                if not path:
                    text = f"llama.cpp's own converter may: {INSTALL}, and name FOLDER in export.converter_path"
                    raise ModelError(f"{error}; {text}") from error
            else:
                return None
        folder = Path(str(path))
        problem = converter_problem(folder) or architecture_problem(folder, self.plan.shape.architecture)
        if self.plan.shape.beside:
            problem = f"GGUF: {self.plan.shape.architecture} is more than its language part, and the file would be that"
        if isinstance(self.plan.scheme, Qat):
            problem = "quant.mode qat rounds as qft's own files do: leave out export.converter"
        if problem:
            raise ModelError(problem)
        return folder

    @cached_property
    def unmergeable(self) -> str | None:
        """Why nothing can be merged into the base."""
        return unmergeable(self.plan.checkpoint, self.weights.model)

    @cached_property
    def onto_original(self) -> Self:
        return replace(self, merge_into="original")

    def settled(self, form: Form) -> Self:
        """The same with what `auto` means for a form that does, or does not, round the adapter away."""
        grid = self.asked == "auto" and self.merge_into == "dequantized" and self.plan.scheme.quant_type
        return self.onto_original if grid and form.regrids else self

    def section(self, form: Form) -> CalibrateSection:
        """How the merged weights are quantized again. Raises RecipeError for an engine that cannot."""
        recipe = self.loaded.recipe
        section = (recipe.calibrate if form.calibrated else None) or form.rounding
        assert section is not None
        if isinstance(self.plan.scheme, Qat) and (layer := self.plan.scheme.target.layer):
            kept = self.weights.linears.keys() - self.plan.scheme.holds(self.weights.model)
            return section.having(**layer.facts(), skip_modules=sorted(kept), allow_partial=True)
        if form.calibrated and (problem := export_problem(section.engine, "compressed-tensors")):
            raise RecipeError(self.loaded.problem("calibrate.engine", problem))
        allowed = any(part.allow_partial for part in (recipe.quant, recipe.calibrate) if part)
        return section.having(allow_partial=allowed)

    def search(self, form: Form) -> CalibrateSection | None:
        """What is tried in the place of `section` where the recipe leaves it open: the same layers and bits, searched
        with the run's own rows."""
        if not form.calibrated or self.loaded.recipe.calibrate or isinstance(self.plan.scheme, Qat):
            return None
        section, longest = self.section(form), self.plan.longest_row(self.loaded.recipe.data)
        return section.having(engine="autoround", max_length=min(max(longest, 8), section.max_length))


def decided(asked: Literal["auto", MergeInto], plan: ModelPlan, *, has_adapter: bool) -> MergeInto | None:
    """Handover.merge_into of most forms."""
    if not has_adapter or plan.scheme.keeps_weights:
        return None
    return "dequantized" if asked == "auto" else asked


def missing_packages(name: str, *, gate: bool = True) -> Iterator[str]:
    """What is to be installed; imports nothing."""
    form = FORMS[name]
    for module, extra in dict.fromkeys(form.needs + (form.gate_needs if gate else ())):
        if importlib.util.find_spec(module) is None:
            yield f"needs {module.replace('_', '-')}; pip install 'qft[{extra}]'"


def require_possible(name: str, handover: Handover, rows: Prepared | None = None) -> None:
    """Raise RecipeError, ModelError or DataError for what keeps the run from being handed over in the form of that
    name. `rows` are the recipe's, if what is calibrated on them is to be looked at too."""
    if problem := _untrained(name, handover.plan):
        raise RecipeError(f"--to {name}: {problem}")
    _require_possible(name, handover, rows)


def _untrained(name: str, plan: ModelPlan) -> str | None:
    """Why the form of that name is not the one that the run is trained for; None if it is, or is trained for none."""
    scheme = plan.scheme
    if not isinstance(scheme, Qat) or FORMS[name] == FORMS[scheme.target.form] or name in scheme.target.also:
        return None
    text = f"the run is trained for {scheme.quant_type} (quant.target), and any other form would hold other weights, or"
    able = " or ".join((scheme.target.form, *scheme.target.also))
    return f"{text} round activations otherwise, than what was trained; export --to {able}"


def _require_possible(name: str, handover: Handover, rows: Prepared | None) -> None:
    form, recipe = FORMS[name], handover.loaded.recipe
    if not form.merges:
        if recipe.adapter.kind == "none":
            raise RecipeError("adapter: the run trains all weights and has no adapter; export --to merged")
        return
    weights = handover.settled(form).weights
    if problem := handover.settled(form).unmergeable:
        raise ModelError(f"{handover.plan.checkpoint.path}: {problem}")
    if form.kind and not handover.settled(form).converter:
        from qft.gguf.file import require_rows

        require_rows(handover.gguf_tensors, weights.config, form.kind)
    elif form.kind == "q4_k":
        raise ModelError("GGUF: llama.cpp's converter makes no q4_k that is one type alone: export --to gguf-q4_k_m")
    if form.rounding:
        asked = handover.loaded.having(calibrate=handover.section(form))
        if rows:
            settled = Settled() if isinstance(handover.plan.scheme, Qat) else None
            plan_calibration(asked, handover.merged, trained=rows, settled=settled)
        else:
            plan_layers(asked, handover.merged)


def foreseen(plan: Plan, names: Iterable[str] = tuple(FORMS), rows: Prepared | None = None) -> dict[str, str | None]:
    """Each of `names`, of FORMS, with what keeps the planned training from being handed over so; None: nothing does."""
    return foreseen_of(plan.model, plan.lora, names, rows)


def foreseen_of(
    base: ModelPlan, lora: dict[str, Any] | None, names: Iterable[str] = tuple(FORMS), rows: Prepared | None = None
) -> dict[str, str | None]:
    """The same of a model and the arguments of its adapter."""
    asked = base.recipe.export.merge_into
    merge_into = decided(asked, base, has_adapter=lora is not None)
    adapter = cache(partial(planned_adapter, base, lora)) if lora else lambda: None
    handover = Handover(base.loaded, base, adapter, asked, merge_into)

    @cache
    def obstacle(name: str) -> str | None:
        after = FORMS[name].after
        return (after and obstacle(after)) or _obstacle(name, handover, rows)

    return {name: _untrained(name, base) or obstacle(name) for name in names}


def _obstacle(name: str, handover: Handover, rows: Prepared | None) -> str | None:
    if missing := next(missing_packages(name), None):
        return missing
    try:
        _require_possible(name, handover, rows)
    except QftError as error:
        return str(error).replace("\n", "; ")
    except Exception as error:  # a model or tokenizer of a kind that nobody has thought of stops an export, not a check
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def require_exports(plan: Plan) -> None:
    """Raise RecipeError if the recipe names forms in export.target, or trains for one by quant.target, in which the
    training could not be handed over."""
    asked: tuple[str, ...] = plan.recipe.export.target
    scheme, field = plan.model.scheme, "export.target"
    if not asked and isinstance(scheme, Qat):
        asked, field = (scheme.target.form,), "quant.target"
    obstacles = {name: why for name, why in foreseen(plan, asked, plan.data).items() if why} if asked else {}
    if not obstacles:
        return
    able = [name for name, why in foreseen(plan).items() if why is None]
    remedy = f"possible are {', '.join(able)}" if able else "nothing is possible"
    refuse(plan.model.loaded, [(field, f"{name}: {why} ({remedy})") for name, why in obstacles.items()])
