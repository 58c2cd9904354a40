"""Rules between fields that need no knowledge of model, data or device."""

import os
import re
from collections.abc import Callable, Iterator

from qft.recipe.calibration import calibrate_rules, unread_by_calibration
from qft.recipe.catalogue import export_problem, unread_by_export
from qft.recipe.data import Source
from qft.recipe.distributed import batch_rules, two_batches, unread_alone
from qft.recipe.memory import MemorySection
from qft.recipe.presets import PRESETS
from qft.recipe.schema import Recipe
from qft.recipe.section import Problem, Section
from qft.recipe.spread import DATABASES, SCHEME, TEXTS, is_local, is_saved, kind
from qft.recipe.training import AdapterSection, ModelSection, QuantSection

QUANT_FIELDS = dict.fromkeys(("quant_type", "double_quant", "compute_dtype", "quant_storage"), "4bit")
QUANT_FIELDS |= {"threshold": "8bit", "plugin": "custom"}
QUANT_FIELDS |= dict.fromkeys(("target", "fake_quant_after_steps", "learn_scales", "distill"), "qat")
"""Fields of `quant` that only one mode reads."""

FREE_SCALES = ("int", "w8a8", "8da4w")
"""What quant.target begins with where scales can be learnt: integers, whose files hold any scale."""

MOST = 2**31 - 1
SKIP_BUDGETS = ("quant.skip_budget_bits", "quant.skip_budget_bytes")

ANSWER_FIELDS = ("regex", "max_new_tokens", "samples")
"""Fields of `eval` that only the metrics read."""


def broken_rules(recipe: Recipe, given: Callable[[str], bool]) -> Iterator[Problem]:
    """Yield (field, what is wrong and what to write instead); `given` tells which fields the recipe sets."""
    for field, reason in unread_fields(recipe).items():
        if given(field):
            yield field, f"{reason}; remove it"
    if given("train.gradient_accumulation_steps"):
        yield from two_batches(recipe.distributed, recipe.train)
    yield from contradictions(recipe)


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield (field, what is wrong and what to write instead), whoever has set the fields."""
    yield from _pattern_rules(recipe)
    yield from _token_rules(recipe.model)
    yield from _huge_numbers(recipe)
    yield from _quant_rules(recipe)
    yield from _skip_rules(recipe.quant)
    yield from _adapter_rules(recipe)
    yield from _source_rules(recipe)
    yield from _data_rules(recipe)
    yield from _train_rules(recipe)
    yield from _offload_rules(recipe)
    yield from batch_rules(recipe.distributed, recipe.train)
    yield from _eval_rules(recipe)
    if recipe.export.converter == "llama.cpp" and not recipe.export.converter_path:
        yield "export.converter", "llama.cpp's is not part of qft: name its folder in export.converter_path"
    if recipe.adapter.kind == "none" and "adapter" in recipe.export.target:
        yield "export.target", "adapter: there is none with adapter.kind none; export merged, or a quantized form"
    if recipe.calibrate and "compressed-tensors" in recipe.export.target:
        problem = export_problem(recipe.calibrate.engine, "compressed-tensors")
        if problem:
            yield "calibrate.engine", f"for export.target, {problem}"
    if recipe.calibrate:
        yield from calibrate_rules(recipe.calibrate, recipe)


def _token_rules(model: ModelSection) -> Iterator[Problem]:
    seen = set[str]()
    for name, token in [("add_tokens", t) for t in model.add_tokens] + [
        ("add_special_tokens", t) for t in model.add_special_tokens
    ]:
        if not token.strip():
            yield f"model.{name}", f"{token!r} is no text that could become a token; remove it"
        elif token in seen:
            yield f"model.{name}", f"{token!r} is named twice; remove one"
        seen.add(token)


def _huge_numbers(recipe: Recipe) -> Iterator[Problem]:
    """Whole numbers that the libraries below, which count in 32 bits, cannot take."""
    for name, section in recipe:
        for field, value in section if isinstance(section, Section) else ():
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if is_whole and value > MOST and not field.endswith(("seed", "bytes", "budget", "checkpointing")):
                yield f"{name}.{field}", f"should be {MOST} or less, not {value}"


def unread_fields(recipe: Recipe) -> dict[str, str]:
    """Fields that nothing reads beside the others' values, and why: to set one of them is an error."""
    train, unread = recipe.train, _unread_by_quant(recipe.quant) | _unread_by_data(recipe)
    unread |= _unread_by_memory(recipe.memory) | unread_alone(recipe.distributed)
    if recipe.adapter.kind == "none":
        fields = (f"adapter.{name}" for name in AdapterSection.model_fields if name != "kind")
        unread |= dict.fromkeys(fields, "has no meaning with adapter.kind none")
    if train.eval_strategy != "steps":
        unread["train.eval_steps"] = "is read only with train.eval_strategy steps"
    if train.save_strategy != "steps":
        unread["train.save_steps"] = "is read only with train.save_strategy steps"
    if train.save_strategy == "no":
        unread["train.save_total_limit"] = "no checkpoint is written with train.save_strategy no"
    if not recipe.eval.metrics:
        unread |= {f"eval.{name}": "is read only with eval.metrics" for name in ANSWER_FIELDS}
    elif "regex" not in recipe.eval.metrics:
        unread["eval.regex"] = "is read only with the metric regex"
    if not recipe.eval.harness:
        unread["eval.harness_limit"] = "is read only with eval.harness"
        if not recipe.eval.metrics:
            unread["eval.batch_size"] = "is read only with eval.metrics or eval.harness"
    unread |= unread_by_export(recipe.export.converter, recipe.quant.mode)
    return unread | (unread_by_calibration(recipe.calibrate) if recipe.calibrate else {})


def _unread_by_quant(quant: QuantSection) -> dict[str, str]:
    others = [(f"quant.{name}", mode) for name, mode in QUANT_FIELDS.items() if mode != quant.mode]
    unread = {name: f"has a meaning only with quant.mode {mode}, and the mode is {quant.mode}" for name, mode in others}
    if quant.target != "w8a8-static":
        text = "has a meaning only with quant.target w8a8-static, of which activations are observed"
        unread["quant.freeze_observers_after_steps"] = text
    if quant.mode == "none":
        unread["quant.skip_modules"] = "nothing is quantized with quant.mode none"
    if quant.mode == "custom":
        unread["quant.allow_partial"] = "the code of quant.plugin decides what it holds"
    if quant.skip_modules != "auto":
        unread |= dict.fromkeys(SKIP_BUDGETS, "is read only with quant.skip_modules auto")
    return unread


def _unread_by_data(recipe: Recipe) -> dict[str, str]:
    fields = ("data.chat_template", "data.template_kwargs") if recipe.data.template == "none" else ()
    unread = dict.fromkeys(fields, "has no meaning with data.template none")
    mixed = (
        {}
        if recipe.data.mix_by != "times"
        else {"data.mix_temperature": "is read only with data.mix_by rows or tokens"}
    )
    return unread | mixed


def _unread_by_memory(memory: MemorySection) -> dict[str, str]:
    text = "is read only with memory.offload disk"
    return {} if memory.offload == "disk" else {"memory.offload_folder": text}


def _quant_rules(recipe: Recipe) -> Iterator[Problem]:
    quant = recipe.quant
    if quant.mode == "custom" and quant.plugin is None:
        yield "quant.plugin", "quant.mode custom needs the Python file of a quantizer; name it, or change the mode"
    if quant.preset and quant.mode != PRESETS["quant"][quant.preset]["mode"]:
        text = f"{quant.preset} is a preset for 4bit, and the mode is {quant.mode}; remove one of the two"
        yield "quant.preset", text
    if quant.mode == "qat":
        yield from _qat_rules(recipe)
    if quant.mode not in ("none", "qat") and recipe.adapter.kind == "none":
        text = (
            f"set adapter.kind to lora to train adapters on the {quant.mode} base, or quant.mode to none to train all"
        )
        yield "adapter.kind", f"quantized weights cannot be trained themselves: {text} weights"
    if quant.mode != "none" and recipe.train.torch_compile:
        yield "train.torch_compile", f"a {quant.mode} base cannot be compiled for training; set it to false"


def _qat_rules(recipe: Recipe) -> Iterator[Problem]:
    quant, adapter = recipe.quant, recipe.adapter
    if quant.target is None:
        yield "quant.target", "quant.mode qat needs the format to train for; name it, or change the mode"
    elif quant.learn_scales and not quant.target.startswith(FREE_SCALES):
        yield "quant.learn_scales", f"the scales of {quant.target} follow from its weights; set it to false"
    if quant.learn_scales and recipe.memory.offload != "none":
        text = "scales start from the weights, which wait elsewhere; set it to false, or memory.offload to none"
        yield "quant.learn_scales", text
    if adapter.lora_dropout:
        yield "adapter.lora_dropout", "the adapter is within the weight that qat rounds, and not behind it; set it to 0"
    if quant.distill and adapter.kind == "none":
        text = "the model that is learnt from is the one without the adapter: set adapter.kind to lora"
        yield "quant.distill", text
    if quant.distill and adapter.bias != "none":
        yield "adapter.bias", "quant.distill learns from the base, whose biases stay as they are; set it to none"
    if quant.distill and recipe.train.label_smoothing_factor:
        yield "train.label_smoothing_factor", "quant.distill learns from predictions, not labels; set it to 0"
    if recipe.calibrate:
        yield "calibrate", "quant.mode qat trains for quant.target, which `qft export` writes; remove the section"


def _skip_rules(quant: QuantSection) -> Iterator[Problem]:
    if quant.skip_modules != "auto":
        return
    if quant.mode in ("custom", "qat"):
        yield "quant.skip_modules", f"auto measures nf4, fp4 and LLM.int8(), and the mode is {quant.mode}: name layers"
    if (quant.skip_budget_bits is None) == (quant.skip_budget_bytes is None):
        yield "quant.skip_modules", "auto needs one budget: skip_budget_bits or skip_budget_bytes"


def _adapter_rules(recipe: Recipe) -> Iterator[Problem]:
    adapter, mode = recipe.adapter, recipe.quant.mode
    if adapter.init_lora_weights == "loftq" and mode != "4bit":
        yield "adapter.init_lora_weights", "loftq starts from a 4-bit quantization error: set quant.mode to 4bit"
    if adapter.init_lora_weights.startswith(("pissa", "olora")) and mode != "none":
        text = (
            f"moves part of the base weights into the adapter, which a {mode} base cannot hold exactly: use default, "
        )
        remedy = "gaussian or (with 4bit) loftq, or set quant.mode to none"
        yield "adapter.init_lora_weights", f"{adapter.init_lora_weights} {text}{remedy}"
    if adapter.use_dora and mode == "custom":
        yield "adapter.use_dora", "peft scales the base weight itself, and cannot read a plugin's; set it to false"
    if adapter.layers_to_transform is not None and isinstance(adapter.target_modules, str):
        yield "adapter.layers_to_transform", "needs adapter.target_modules as a list of layer names"


def _data_rules(recipe: Recipe) -> Iterator[Problem]:
    data, train = recipe.data, recipe.train
    if not data.train and not (recipe.calibrate and recipe.calibrate.data):
        yield "data.train", "should be a path, one source ({path, format, weight, …}), or a list of either"
    if data.eval and data.eval_fraction:
        yield "data.eval_fraction", "data.eval already holds rows out; give one of the two"
    for i, source in enumerate(data.eval):
        if source.weight != 1:
            yield f"data.eval.{i}.weight", "held-out rows count once each; weights are for data.train"
    if data.streaming:
        yield from _streaming_rules(recipe)
    if data.eval or data.eval_fraction:
        return
    remedy = "needs held-out rows: set data.eval or data.eval_fraction"
    if train.eval_strategy != "no":
        yield "train.eval_strategy", remedy
    if recipe.eval.metrics:
        yield "eval.metrics", remedy


def _source_rules(recipe: Recipe) -> Iterator[Problem]:
    data, asked = recipe.data, recipe.calibrate.data if recipe.calibrate else ()
    for section, sources in {"data.train": data.train, "data.eval": data.eval, "calibrate.data": asked}.items():
        told: tuple[str, ...] = ()
        for i, source in enumerate(sources):
            if scheme := SCHEME.match(source.path):
                text = f"{scheme[0]} is not read: a source is a file, a folder or a hub dataset's id; of SQL it is a "
                remedy = "SQLite file (path: rows.db, sql: SELECT …): save what others hold as .parquet"
                yield f"{section}.{i}.path", f"{text}{remedy}"
                continue
            unread = dict(_unread_by_source(source))
            here = (os.path.dirname(source.path), *unread)
            for field, why in unread.items() if here != told else ():  # once of all files of a folder
                yield f"{section}.{i}.{field}", f"{why}: remove it"
            told = here


def _unread_by_source(source: Source) -> Iterator[Problem]:
    """Fields of a source that what lies at its path has no use for."""
    if source.sql is not None and kind(source.path) not in DATABASES:
        yield "sql", f"is asked of SQLite files ({', '.join(DATABASES)}), and {source.path} is none"
    if source.sample_by != "line" and kind(source.path) not in TEXTS:
        yield "sample_by", f"parts files of text ({', '.join(TEXTS)}), and {source.path} is none"
    if not is_local(source.path):
        return
    for field in ("name", "revision"):
        if getattr(source, field) is not None:
            yield field, f"is asked of hub datasets, and {source.path} is none"
    if source.split != "train" and not is_saved(source.path):
        text = f"is of hub datasets and of what `datasets` saved; all rows of {source.path} are read"
        yield "split", f"{text} (weight: 0.2 draws a fifth of them, a pattern names some files of a folder)"


def _streaming_rules(recipe: Recipe) -> Iterator[Problem]:
    """What cannot be done with rows that nobody has counted."""
    data, train = recipe.data, recipe.train
    if train.max_steps < 0:
        yield "train.max_steps", "data.streaming counts no rows before they are learnt: say after how many steps to end"
    if data.eval_fraction:
        yield "data.eval_fraction", "draws among all rows, and data.streaming reads some at a time: give data.eval"
    if train.train_sampling_strategy == "group_by_length":
        text = (
            "group_by_length orders all rows, and data.streaming reads some at a time: set it to random or sequential"
        )
        yield "train.train_sampling_strategy", text
    if data.mix_by != "times":
        yield "data.mix_by", "needs the size of every source, and data.streaming counts none: set it to times"
    for source in data.train:
        is_array = kind(source.path) == ".json"
        if is_array or source.sample_by == "document":
            remedy = "write it as .jsonl" if is_array else "set its sample_by to line or paragraph"
            yield (
                "data.streaming",
                f"reads some rows at a time, and {source.path} as a whole: {remedy}, or set it to false",
            )


def _pattern_rules(recipe: Recipe) -> Iterator[Problem]:
    patterns = [("eval.regex", recipe.eval.regex or "")]
    patterns += [("model.ignore_unexpected", pattern) for pattern in recipe.model.ignore_unexpected]
    for field, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield field, f"{pattern!r} is no regular expression: {error}"


def _offload_rules(recipe: Recipe) -> Iterator[Problem]:
    """What cannot wait off the device."""
    adapter, none = recipe.adapter, "or memory.offload to none"
    if recipe.memory.offload == "none":
        return
    if adapter.kind == "none":
        yield "memory.offload", f"weights that are trained stay on the device: set adapter.kind to lora, {none}"
    if adapter.init_lora_weights.startswith(("pissa", "olora")):
        text = f"{adapter.init_lora_weights} changes the base weights, which are put away unchanged: set it to default"
        yield "adapter.init_lora_weights", f"{text}, {none}"
    if recipe.quant.mode == "custom":
        text = "how the code of quant.plugin holds its weights is known to it alone: set quant.mode to 4bit or 8bit"
        yield "memory.offload", f"{text}, {none}"
    if recipe.train.torch_compile:
        yield "train.torch_compile", f"a model whose weights come and go cannot be compiled: set it to false, {none}"


def _eval_rules(recipe: Recipe) -> Iterator[Problem]:
    pattern = recipe.eval.regex
    if "regex" in recipe.eval.metrics and pattern is None:
        yield "eval.metrics", "regex needs a pattern in eval.regex"


def _train_rules(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if train.fp16 and train.bf16 is True:
        yield "train.fp16", "fp16 and bf16 are two answers to one question; turn one of them off"
    if recipe.adapter.kind == "none" and recipe.model.dtype == "float16":
        yield "model.dtype", "float16 weights cannot take small updates; train them in float32 or bfloat16"
    if train.max_steps == 0:
        yield "train.max_steps", "0 steps train nothing; give 1 or more, or -1 to count epochs"
    if train.eval_strategy == "steps" and train.eval_steps is None:
        yield "train.eval_strategy", "steps needs train.eval_steps"
    if train.early_stopping_patience is not None and not train.load_best_model_at_end:
        yield "train.early_stopping_patience", "needs train.load_best_model_at_end: true"
    field = "train.load_best_model_at_end"
    if not train.load_best_model_at_end:
        return
    if train.eval_strategy == "no":
        yield field, "needs evaluations to choose by: set train.eval_strategy"
    elif train.eval_strategy != train.save_strategy:
        yield field, "needs train.save_strategy equal to train.eval_strategy, so that each evaluation has a checkpoint"
    elif train.eval_strategy == "steps" and train.eval_steps and train.save_steps % train.eval_steps:
        yield field, "needs train.save_steps to be a multiple of train.eval_steps"
