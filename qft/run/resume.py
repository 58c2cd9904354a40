"""What a resumed run may change: every field of the recipe, by what becomes of a change.

fixed     refused by name: the checkpoint was made by it
honoured  takes effect from the checkpoint on, as if it had stood there, and is said
free      takes effect, and changes nothing of what is learnt
"""

import json
from collections.abc import Iterable, Iterator, Set
from typing import Any, Literal, NamedTuple

from qft.documents.manifest import Manifest
from qft.documents.plan import CalibrationPlanDocument, PlanDocument
from qft.errors import RunError
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.data import Source
from qft.recipe.section import Problem, Section
from qft.recipe.stages import effective, field_of

Planned = PlanDocument | CalibrationPlanDocument
Class = Literal["fixed", "honoured", "free"]
ANEW = "or start anew with --overwrite"

TABLE: dict[str, dict[Class, str]] = {
    "plan": {
        "fixed": """
            model.path model.revision model.ignore_unexpected model.dequantize model.dtype model.attn_implementation
            model.add_tokens model.add_special_tokens
            quant.mode quant.plugin quant.quant_type quant.double_quant quant.compute_dtype
            quant.threshold quant.skip_modules quant.skip_budget_bits quant.skip_budget_bytes
            quant.target quant.fake_quant_after_steps quant.freeze_observers_after_steps quant.learn_scales
            quant.distill
            adapter.kind adapter.r adapter.lora_alpha adapter.lora_dropout adapter.target_modules
            adapter.target_experts adapter.exclude_modules adapter.target_towers adapter.layers_to_transform
            adapter.use_rslora adapter.use_dora adapter.init_lora_weights adapter.bias adapter.modules_to_save
            data.train data.eval data.eval_fraction data.mix_by data.mix_temperature data.format
            data.max_length data.on_too_long data.on_bad_row data.streaming
            data.packing data.padding_free data.loss_on data.train_on_eos data.prompt_loss_weight data.ignore_fields
            data.template data.chat_template data.template_kwargs
            train.per_device_train_batch_size train.gradient_accumulation_steps train.train_sampling_strategy
            train.lr_scheduler_type train.warmup_steps train.optim train.bf16 train.fp16
            train.stages
            seed
        """,
        "honoured": """
            model.device
            train.num_train_epochs train.max_steps train.learning_rate train.weight_decay train.adam_beta1
            train.adam_beta2 train.adam_epsilon train.max_grad_norm train.neftune_noise_alpha
            train.label_smoothing_factor train.router_aux_loss_coef train.on_nonfinite train.load_best_model_at_end
            train.early_stopping_patience train.tf32 train.gradient_checkpointing train.chunked_loss train.torch_compile
            train.full_determinism train.kernels train.matmul
        """,
        "free": """
            model.trust_remote_code quant.preset quant.quant_storage quant.allow_partial data.num_proc data.audit memory
            train.run_name train.per_device_eval_batch_size train.dataloader_num_workers train.dataloader_pin_memory
            train.logging_steps train.eval_strategy train.eval_steps train.save_strategy train.save_steps
            train.save_total_limit train.save_on_signal train.report_to
            eval calibrate export distributed output_dir
        """,
    },
    "calibration-plan": {
        "fixed": """
            model.path model.revision model.ignore_unexpected model.dequantize model.dtype model.device
            model.attn_implementation model.trust_remote_code model.add_tokens model.add_special_tokens
            data.train data.eval data.eval_fraction data.mix_by data.mix_temperature data.format
            data.max_length data.on_too_long data.on_bad_row
            data.loss_on data.train_on_eos data.prompt_loss_weight data.ignore_fields data.template data.chat_template
            data.template_kwargs
            calibrate.engine calibrate.engine_python calibrate.algorithm calibrate.data calibrate.samples
            calibrate.max_length calibrate.data_type calibrate.bits calibrate.group_size calibrate.symmetric
            calibrate.activations calibrate.iters calibrate.skip_modules calibrate.seed calibrate.verify_samples
            seed
        """,
        "honoured": """
            calibrate.accept calibrate.serve calibrate.remedy calibrate.distill_steps calibrate.distill_learning_rate
            calibrate.max_bytes
        """,
        "free": """
            data.num_proc data.audit data.packing data.padding_free data.streaming
            calibrate.preset calibrate.allow_partial quant adapter train memory distributed eval export output_dir
        """,
    },
}
"""By the kind of the plan. A section stands for all its fields, where none of them is read before the run is over."""

LENGTHS = ("max_steps", "num_train_epochs")
"""Of a stage; where another one follows, they say where that begins."""
STAGES = "train.stages."
"""With which the fields of stages begin."""

CLASSES: dict[str, dict[str, Class]] = {
    kind: {field: name for name, fields in classes.items() for field in fields.split()}
    for kind, classes in TABLE.items()
}


def class_of(kind: str, field: str) -> Class:
    """What becomes of a change of `field`, or of the nearest thing around it. Raises KeyError if nothing is said."""
    classes = CLASSES[kind]
    if field.startswith(STAGES):
        field = field_of(field) or "train.stages"
    while field not in classes and "." in field:
        field = field.rpartition(".")[0]
    return classes[field]


class Before(NamedTuple):
    """What the run folder says of the run that is to be resumed."""

    recipe: Recipe
    plan: Planned
    manifest: Manifest


def compare(before: Before, recipe: Recipe, plan: Planned, facts: Manifest) -> tuple[list[Problem], list[Problem]]:
    """What forbids to go on as `recipe`, `plan` and `facts` say, and which changes take effect from here on."""
    changes = list(_changes(before, recipe, plan))
    borders = {f"{STAGES}{n}.{name}" for n in range(len(recipe.train.stages) - 1) for name in LENGTHS}
    fixed = [each for each in changes if each.field in borders or class_of(plan.kind, each.field) == "fixed"]
    honoured = [each for each in changes if each not in fixed and class_of(plan.kind, each.field) == "honoured"]
    # What was decided follows what was asked, and what a field names is looked at only if it names the same.
    problems = [
        (field, f"the run was started with {old}, and this is {new}; set it back to {old}, {ANEW}")
        for field, old, new, asked in fixed
        if asked or not any(each.asked for each in fixed)
    ]
    files, rows = _changed_files(before.manifest, recipe, facts), _changed_rows(before.plan, plan)
    return problems or [*files] or [*rows], [(field, f"{new}, and was {old}") for field, old, new, _ in honoured]


def refuse_to_resume(loaded: LoadedRecipe, problems: Iterable[Problem]) -> None:
    """Raise RunError with all problems, each at its place in the recipe."""
    if found := [loaded.problem(field, text) for field, text in problems]:
        raise RunError("\n".join(found))


class _Change(NamedTuple):
    field: str
    old: str
    new: str
    asked: bool
    """Whether the recipe says another thing, and not only this machine."""


def _changes(before: Before, recipe: Recipe, plan: Planned) -> Iterator[_Change]:
    """Yield each field that does not mean what it meant."""
    was, now = _decided(before.plan), _decided(plan)
    old, new = (_asked(each, was.keys() | now.keys()) for each in (before.recipe, recipe))
    for field in [field for field in old if field in new]:  # others are of a source that came or went with its path
        decided = field in was.keys() & now.keys()  # an older plan.json tells less
        one, other = (was, now) if decided else (old, new)
        if one[field] != other[field]:
            yield _Change(field, _shown(one[field]), _shown(other[field]), asked=old[field] != new[field])


def _asked(recipe: Recipe, decided: Set[str]) -> dict[str, Any]:
    """Each field with its value; of those of stages, what it is in each of them, and beside it what was decided."""
    asked, of_stages = dict(_leaves(recipe)), dict(effective(recipe))
    within = {field_of(name) for name in of_stages} - decided
    own = {field: value for field, value in asked.items() if field not in within}
    return own | of_stages | {"train.stages": len(recipe.train.stages)}


def _changed_files(before: Manifest, recipe: Recipe, facts: Manifest) -> Iterator[Problem]:
    """Yield the fields whose files are no longer what the run began with."""
    for path, digest in (facts.data or {}).items():
        if digest != (before.data or {}).get(path, digest):
            fields = (field for field, value in _leaves(recipe) if isinstance(value, list) and path in value)
            yield next(fields, "data"), f"{path} has changed since the run began; restore it, {ANEW}"
    if before.plugin != facts.plugin:
        yield "quant.plugin", f"the file has changed since the run began; restore it, {ANEW}"


def _changed_rows(was: Planned, plan: Planned) -> Iterator[Problem]:
    """Yield the sources whose rows are no longer what the run began with, though their files are."""
    text = "{} rows of {} tokens, {} of them learnt"
    for old, new in zip(was.data.sources, plan.data.sources, strict=False):
        counts = [(each.rows, each.tokens, each.supervised_tokens) for each in (old, new)]
        if counts[0] != counts[1]:
            told = [text.format(*count) for count in counts]
            yield f"data.{new.part}", f"{new.path} gave {told[0]}, and now gives {told[1]}; find what changed, {ANEW}"


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Source):
            yield f"{prefix}{name}", [source.path for source in value]
            for i, source in enumerate(value):
                yield from _leaves(source, f"{prefix}{name}.{i}.")
        elif not (isinstance(section, Source) and name == "path"):
            yield f"{prefix}{name}", value


def _decided(plan: Planned) -> dict[str, Any]:
    """What an `auto` came to, by its field: on another machine the same recipe may mean something else."""
    decided: dict[str, Any] = {"model.device": plan.device.kind, "model.dtype": plan.model.dtype}
    if isinstance(plan, PlanDocument):
        training = plan.training
        decided |= {f"train.{name}": bool(getattr(training, name, None)) for name in ("bf16", "fp16", "tf32")}
        decided["data.max_length"] = plan.data.max_length
        decided["quant.compute_dtype"] = (plan.quantization.model_extra or {}).get("bnb_4bit_compute_dtype")
    return {field: value for field, value in decided.items() if value is not None}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
