"""What `qft eval` compares and `qft chat` talks to: `PATH` or `PATH@VARIANT`, told apart and loaded.

PATH is a recipe, a run folder, or a model (hub id, folder, .gguf file, package:NAME/FILE). VARIANT is one of VARIANTS.
Without one, a run is its adapter on its base, a recipe its base as it is held, and a model what it is. A .gguf file is
dequantized by transformers, and with @llama.cpp run as it is; so is the file of an exported folder. With @vllm an
export or a model is not loaded here: vLLM's server is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from qft.checkpoint.stored import some
from qft.documents.manifest import Manifest
from qft.documents.recorded import record_of, require_whole_run, unverified
from qft.errors import MissingError, ModelError, RecipeError
from qft.files import require_regular_files
from qft.gguf.llamacpp import LlamaCpp, require_llamacpp
from qft.model.adapter import require_fit, with_adapter
from qft.model.load import load_base
from qft.model.rounded import FILE, read_learnt, round_weights
from qft.plan import ModelPlan, plan_model
from qft.quant.rounding_state import state_of
from qft.recipe import LoadedRecipe, load
from qft.recipe.load import from_values
from qft.recipe.training import OF_FILES, QuantSection
from qft.run.folder import Run
from qft.run.lock import require_free

LLAMACPP = "llama.cpp"
VLLM = "vllm"
"""Of no model that is loaded here: vLLM's server has it, in an environment of its own."""
UNQUANTIZED = QuantSection()
FOUR_BIT = QuantSection(mode="4bit")

VARIANTS: dict[str, tuple[QuantSection, str]] = {
    "base": (UNQUANTIZED, "auto"),
    **{dtype: (UNQUANTIZED, dtype) for dtype in ("float32", "bfloat16", "float16")},
    "nf4": (FOUR_BIT, "auto"),
    "fp4": (FOUR_BIT.having(quant_type="fp4"), "auto"),
    "8bit": (QuantSection(mode="8bit"), "auto"),
    "merged": (UNQUANTIZED, "auto"),
    LLAMACPP: (UNQUANTIZED, "auto"),
}
"""How to hold the base, and the dtype of what is not quantized. merged: the adapter added to 16-bit weights; llama.cpp:
the .gguf file, run by llama.cpp."""


@dataclass(frozen=True)
class Target:
    """One model to evaluate or to talk to."""

    name: str
    loaded: LoadedRecipe
    """A recipe whose model and quant sections say how the base is held."""
    has_recipe: bool
    """Whether the recipe is the user's, so that its data and eval sections say something."""
    adapter: Path | None = None
    variant: str = ""
    """Of VARIANTS; empty: the target is what it is."""
    rows: Path | None = None
    """The encoded rows that its run keeps."""
    run: Run | None = None
    manifest: Manifest | None = None
    """Of the run, if it is one, before anything else of it was read."""

    @property
    def in_llamacpp(self) -> bool:
        """Whether llama.cpp runs it, and not transformers."""
        return self.variant == LLAMACPP

    @property
    def unverified(self) -> str | None:
        """What is to be told if it comes of a run without hashes."""
        return unverified(self.adapter or Path(self.loaded.recipe.model.path))

    def plan(self) -> ModelPlan:
        """How the base is held. Raises what `plan_model` does, and ModelError for an adapter that does not fit it, or
        was trained on another base, as far as that is on this machine."""
        plan = plan_model(self.loaded, adapted=self.adapter is not None)
        if self.adapter:
            require_fit(self.adapter, plan)
            if plan.checkpoint.has_weights:
                require_same_base(self.adapter, plan)
        return plan


def parse_target(text: str, *, adapter: Path | None, data: str | None) -> Target:
    """Tell what `text` names. Raises RecipeError, MissingError for what is not there, or DamagedError for what is
    no longer as qft wrote it. `adapter` is put on a model that brings none; `data` stands in for the recipe that a
    model has not."""
    path, variant = split_variant(text)
    if variant == VLLM:
        raise RecipeError(f"{text}: is asked of vLLM's server: alone, and by qft eval and qft chat; evaluate it apart")
    if file := _exported_gguf(Path(path)):
        path, variant = str(file), variant or LLAMACPP
    if variant == LLAMACPP:
        require_llamacpp()
        if not path.endswith(".gguf"):
            raise RecipeError(f"{text}: is no .gguf file, and llama.cpp runs no other")
    run = Run(Path(path))
    manifest = run.manifest()
    require_whole_run(run.folder)
    loaded, own_adapter = _find(path, data)
    adapter = adapter or own_adapter
    if variant and variant != "merged":
        adapter = None
    if variant == "merged" and adapter is None:
        raise RecipeError(f"{text}: there is no adapter to merge; name a run, or give --adapter")
    if adapter is not None and (record := record_of(adapter)):
        record.require_whole()
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise MissingError(f"{adapter}: holds no adapter (adapter_config.json)")
    if adapter is not None:
        require_regular_files(adapter)
    is_run = manifest is not None
    return Target(
        name=text,
        loaded=_held_as(loaded, variant),
        has_recipe=Path(path).suffix in {".yaml", ".yml"} or is_run,
        adapter=adapter,
        variant=variant,
        rows=run.rows if is_run and run.rows.is_file() else None,
        run=run if is_run else None,
        manifest=manifest,
    )


def split_variant(text: str) -> tuple[str, str]:
    """The path that `text` names, and its variant, empty without one. Raises RecipeError for a variant that is none."""
    path, at, variant = text.rpartition("@")
    if at and variant in (*VARIANTS, VLLM):
        return path, variant
    if at and "/" not in variant and not Path(text).exists():
        raise RecipeError(f"{text}: {variant} is none of the variants {', '.join((*VARIANTS, VLLM))}")
    return text, ""


def load_target(target: Target, plan: ModelPlan) -> Any:
    """The model, ready to evaluate. Raises ModelError if the adapter belongs to another base, BusyError if its run was
    replaced since the target was parsed."""
    if target.in_llamacpp:
        return LlamaCpp(*plan.checkpoint.weight_files())
    _require_same_plugin(plan.checkpoint.folder, plan, "quantized")
    model = load_base(plan)
    if target.adapter is not None:
        require_same_base(target.adapter, plan)
        model = with_adapter(model, target.adapter)
        if target.variant == "merged":
            model = model.merge_and_unload()
    round_weights(model, plan)
    _recall(model, target.adapter or plan.checkpoint.folder)
    if target.run:
        target.run.require_same(target.manifest)
    return model.eval()


def _recall(model: Any, folder: Path) -> None:
    """What the training of this adapter, or of these weights, has learnt besides. Weights that were trained without
    have the scales that follow from them, but no range of activations: raises ModelError."""
    learnt = state_of(model)
    if (folder / FILE).is_file():
        read_learnt(model, folder)
    elif learnt and learnt.unobserved():
        text = "has the range of its activations from no training (quant.target w8a8-static)"
        raise ModelError(f"{folder}: {text}: evaluate a run that was trained so, or set quant.target to w8a8")


def _find(path: str, data: str | None) -> tuple[LoadedRecipe, Path | None]:
    """The recipe behind `path` and the adapter that lies with it."""
    run = Run(Path(path))
    if run.manifest():
        loaded = load(run.folder / "recipe.yaml")
        if run.full_model.is_dir() or record_of(run.full_model):
            made = dict.fromkeys(OF_FILES[2:], ()) | {"path": str(run.full_model.resolve()), "dequantize": False}
            return loaded.having(model=made), None
        if not run.adapter.is_dir() and not record_of(run.adapter):
            require_free(run.folder)
            raise MissingError(f"{path}: the run has no adapter; it did not complete")
        return loaded, run.adapter
    if not isinstance(damaged := run.no_run(), MissingError):
        raise damaged
    if Path(path).suffix in {".yaml", ".yml"}:
        return load(Path(path)), None
    return from_values({"model": {"path": path}, "data": {"train": data or ()}, "output_dir": "."}), None


def _exported_gguf(folder: Path) -> Path | None:
    """The file of a folder that holds one GGUF file and no other model."""
    found = list(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    return found[0] if len(found) == 1 else None


def _held_as(loaded: LoadedRecipe, variant: str) -> LoadedRecipe:
    """The recipe with its base held as the variant says; without one, as it says itself."""
    if variant:
        quant, dtype = VARIANTS[variant]
        loaded = loaded.having(quant=quant, model={"dtype": dtype})
    elif loaded.recipe.quant.skip_modules == "auto":
        text = "auto is decided by `qft train`: name the run, or a variant such as @nf4"
        raise RecipeError(loaded.problem("quant.skip_modules", text))
    # Whether weights are trained decides the dtype that `auto` stands for; here none are.
    return loaded.having(adapter={"kind": "lora"})


def require_one_tokenizer(targets: Sequence[Target], plans: Sequence[ModelPlan]) -> None:
    """Raises ModelError for targets whose tokens or templates are others than the first one's."""
    first = plans[0]
    for target, plan in zip(targets[1:], plans[1:], strict=True):
        if _tokens(plan) != _tokens(first) or plan.tokenizer.chat_template != first.tokenizer.chat_template:
            raise ModelError(
                f"{target.name}: its tokenizer or chat template differs from that of {targets[0].name}, so their "
                "tokens cannot be compared; evaluate them apart (bits per byte compare across tokenizers)"
            )


def _tokens(plan: ModelPlan) -> dict[str, int]:
    """The vocabulary, as far as there are embeddings; without what a GGUF file calls those that stand for no token."""
    embedded = plan.checkpoint.config.get_text_config().vocab_size
    return {token: i for token, i in plan.tokenizer.get_vocab().items() if i < embedded and token != f"[PAD{i}]"}


def require_same_base(adapter: Path, plan: ModelPlan) -> None:
    """An adapter of a run knows the hashes of its base, and of the plugin that quantized it."""
    run = Run(adapter.parent)
    if run.base and run.base.sha256 and (names := run.base.changed(plan.checkpoint.with_weights().digests())):
        path = plan.checkpoint.path
        text = f"{adapter}: was trained on another base than {path} ({some(names)}: not what it was then)"
        if path == run.base.path:
            accept = f"`qft report --verify --accept {quote(str(run.folder))}` records it"
            text += f"; put back what it was; if it is meant, {accept}"
        raise ModelError(text)
    _require_same_plugin(adapter, plan, "trained")


def _require_same_plugin(part: Path, plan: ModelPlan, made: str) -> None:
    """What a run has made (its adapter, its model) belongs to the plugin as it was then."""
    manifest = Run(part.parent).manifest()
    plugin = manifest.plugin if manifest else None
    now = plan.scheme.plugin
    if plugin and now and plugin.path == now.path and plugin.sha256 != now.sha256:
        raise ModelError(f"{part}: quant.plugin ({now.path}) has changed since this was {made}")
