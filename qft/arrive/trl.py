"""Keys of `trl sft --config` (trl.SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig of version 1.16)."""

from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import (
    Config,
    Kind,
    Line,
    Rule,
    choose,
    decided,
    default,
    fields_of,
    ignored,
    many,
    refused,
    sets,
    to,
    when_on,
)
from qft.arrive.shared import LOADERS, SEVERAL, attention, experts, held_out, is_place, processes, within
from qft.arrive.trainer import TRAINER, trainer_defaults
from qft.arrive.trl_scripts import EVERY_COLUMN, OTHER_TRAINERS, SCRIPTS, evaluates

NAME = "TRL"
TEMPLATES: dict[str, str] = {}
UNKNOWN = refused("trl refuses a key that it does not know: remove it")
PEFTS = r".*\.(q_proj|v_proj|[q]kv_proj|query_key_value|c_attn|Wqkv)"
"""What peft adapts where nobody says: the names that it has for the types of models, of which each has some. With
brackets among them they are no plain list of names, each of which the model must have."""
UNLIMITED = "null"
DTYPES = {name: name for name in ("auto", "float32", "bfloat16", "float16")}


def knows(values: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in values


def flat(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """As it is, but for the one empty key that says something there: without a length nothing is cut."""
    unlimited = "max_length" in values and values["max_length"] is None
    return {**values, "max_length": UNLIMITED} if unlimited else values


@sets("adapter.kind")
def peft(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, sets={"adapter.kind": "lora" if value else "none"})


def for_lora(field: str, rule: Rule | None = None) -> Rule:
    """A field of the adapter, which is there with use_peft alone."""

    def asked(key: str, value: Any, config: Config) -> Iterator[Line]:
        if config.get("use_peft"):
            yield from (rule or to(field))(key, value, config)
        else:
            yield Line(key, Kind.NO_EFFECT, "is read only with use_peft: without it, trl trains all weights")

    return sets(*(fields_of(rule) if rule else [field]))(asked)


@sets("adapter.target_modules")
def targets(key: str, value: Any, config: Config) -> Iterator[Line]:
    names = value.split() if isinstance(value, str) else value
    yield Line(key, Kind.OTHER_FIELD, sets={"adapter.target_modules": names[0] if names == ["all-linear"] else names})


def held(mode: str) -> Rule:
    """load_in_4bit and load_in_8bit."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        fields: dict[str, Any] = {"quant.mode": mode}
        if mode == "4bit":
            fields["quant.double_quant"] = bool(config.get("use_bnb_nested_quant", False))
            fields["quant.quant_type"] = config.get("bnb_4bit_quant_type", "nf4")
        yield Line(key, Kind.OTHER_FIELD, "trl's default is no double quantization" if mode == "4bit" else "", fields)

    return when_on(sets("quant.mode")(rule))


@sets("data.train")
def dataset(key: str, value: Any, config: Config) -> Iterator[Line]:
    if config.get("datasets"):
        yield Line(key, Kind.NO_EFFECT, "trl reads datasets, and not this beside them")
        return
    name = None if is_place(value) else config.get("dataset_config")
    made = {"name": name, "split": config.get("dataset_train_split")}
    source = {"path": config.local(value), **{name: each for name, each in made.items() if each}}
    yield Line(key, Kind.OTHER_FIELD, sets={"data.train": within(source)})
    if evaluates(config):
        split = {**source, "split": config.get("dataset_test_split", "test")}
        yield Line(key, Kind.OTHER_FIELD, "held-out rows", {"data.eval": within(split)})


def configuration(key: str, value: Any, config: Config) -> Iterator[Line]:
    if not is_place(str(config.get("dataset_name", ""))):
        yield Line(key, Kind.DECIDED, "with dataset_name: data.train.name")
    elif value == "default":
        yield Line(key, Kind.NO_EFFECT, "a folder has but one")
    else:
        yield Line(key, Kind.UNSUPPORTED, "a folder is read without its configurations: name the files in data.train")


MIXED = {
    "columns": (Kind.DECIDED, EVERY_COLUMN),
    "data_files": (Kind.UNSUPPORTED, "files within a hub data set: download them to where data.train has them"),
    "data_dir": (Kind.UNSUPPORTED, "download the files, and name them in data.train"),
    "fraction": (
        Kind.UNSUPPORTED,
        "a share of the mixture, for which trl leaves rows out: give the data set's weight in data.train",
    ),
}
"""Of a data set of a mixture: what comes nearest."""


@sets("data.train")
def mixture(key: str, value: Any, config: Config) -> Iterator[Line]:
    found = []
    for i, each in enumerate(value):
        files = each.get("data_files") or []
        files = files if isinstance(files, list) else [files]
        read = each.get("path") in LOADERS
        others = [name for name in each if name not in ("path", "name", "split") and each[name]]
        wrong = [(*MIXED.get(name, (Kind.UNSUPPORTED, "trl refuses it: remove it")), name) for name in others
                 if not (name == "data_files" and read)]  # fmt: skip
        made = {name: each[name] for name in ("name", "split") if each.get(name)}
        for path in files or [each.get("path")]:
            found += within({"path": config.local(str(path)), **made}) if path else []
        for kind, text, name in wrong or [(Kind.OTHER_FIELD, "", "")]:
            yield Line(f"{key}.{i}", kind, f"{name}: {text}" if name else "")
    if found:
        yield Line(key, Kind.OTHER_FIELD, sets={"data.train": found})


@sets("data.max_length", "data.on_too_long")
def length(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Of rows, in tokens; a longer one is cut there, and without a length none is."""
    if value == UNLIMITED:
        text = "none there; here the model's own, or 2048 where that is less, and a longer row stops the run"
        yield Line(key, Kind.DECIDED, text, {"data.max_length": "auto", "data.on_too_long": "stop"})
    else:
        yield Line(key, Kind.SAME, sets={"data.max_length": value})


def loss(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value == "dft":
        yield Line(key, Kind.UNSUPPORTED, "the loss is the likelihood, each token counting the same: remove it")
    else:
        text = "logits of some thousand tokens at a time, the same loss (train.chunked_loss)"
        yield Line(key, Kind.DECIDED, text)


def packing_strategy(key: str, value: Any, config: Config) -> Iterator[Line]:
    cut = "" if value == "bfd" else f"; {value} would go on with the rest of a row in another"
    yield Line(key, Kind.DECIDED, f"rows are packed by best fit, and none is parted{cut}")


def preparation(key: str, value: Any, config: Config) -> Iterator[Line]:
    """dataset_kwargs, of which trl reads one."""
    for name, each in value.items():
        if name != "skip_prepare_dataset":
            yield Line(f"{key}.{name}", Kind.NO_EFFECT, "trl reads skip_prepare_dataset alone")
        elif each:
            text = "qft prepares rows itself: give them as text, and remove this"
            yield Line(f"{key}.{name}", Kind.UNSUPPORTED, text)
        else:
            yield Line(f"{key}.{name}", Kind.SAME, "off, as here")


@sets("data.loss_on")
def completion(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, sets={"data.loss_on": "assistant" if value else "all"})


@sets("data.loss_on")
def assistant(key: str, value: Any, config: Config) -> Iterator[Line]:
    fields = {"data.loss_on": "assistant"} if value else {}
    yield Line(key, Kind.OTHER_FIELD if value else Kind.SAME, sets=fields)


def text_field(key: str, value: Any, config: Config) -> Iterator[Line]:
    """The field of a text; rows of messages, or of prompt and completion, have none, and trl does not read it then."""
    same = value in ("text", "messages", "prompt", "completion")
    text = f"rows of plain text are told so: columns: {{{value}: text}} of their source in data.train"
    yield Line(key, Kind.SAME if same else Kind.UNSUPPORTED, "" if same else text)


@sets("data.chat_template")
def template(key: str, value: Any, config: Config) -> Iterator[Line]:
    if str(value).endswith((".jinja", ".j2")):
        yield Line(key, Kind.OTHER_FIELD, sets={"data.chat_template": config.local(value)})
    else:
        yield Line(key, Kind.UNSUPPORTED, "the template of another model: save it as a .jinja file")


@sets("data.on_too_long")
def truncation(key: str, value: Any, config: Config) -> Iterator[Line]:
    keeps = value == "keep_start"
    text = "" if keeps else "data.on_too_long truncate keeps the beginning"
    yield Line(key, Kind.SAME if keeps else Kind.UNSUPPORTED, text)


@sets("model.dtype")
def dtype(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield from choose("model.dtype", DTYPES, "model.dtype: auto, float32, bfloat16 or float16")(key, value, config)


LOADING = {
    "dtype": dtype,
    "torch_dtype": dtype,
    "attn_implementation": attention,
    "trust_remote_code": to("model.trust_remote_code"),
    "revision": to("model.revision"),
    **many({"how a model is loaded": "device_map low_cpu_mem_usage use_cache"}, decided),
}
"""What from_pretrained is told, of which trl reads some as keys of its own too."""


@sets("model.dtype", "model.attn_implementation")
def loading(key: str, value: Any, config: Config) -> Iterator[Line]:
    """model_init_kwargs."""
    for name, each in value.items():
        rule = LOADING.get(name, refused("qft tells from_pretrained what the fields of model say: remove it"))
        if each is None:
            yield Line(f"{key}.{name}", Kind.NO_EFFECT, "empty: as if it were not there")
        else:
            yield from rule(f"{key}.{name}", each, config)


def defaults(config: Config, fields: Mapping[str, Any]) -> Iterator[Line]:
    yield default("adapter.kind", "none", "use_peft")
    if fields.get("adapter.kind") == "lora":
        yield default("adapter.lora_alpha", 32, "lora_alpha")
        yield default("adapter.lora_dropout", 0.05, "lora_dropout")
        yield default("adapter.target_modules", PEFTS, "lora_target_modules, which peft then chooses")
    yield default("model.dtype", "float32", "dtype")
    yield default("train.bf16", not fields.get("train.fp16", False), "bf16")
    yield default("data.max_length", 1024, "max_length")
    yield default("data.on_too_long", "truncate", "max_length")
    text = "assistant_only_loss (of rows with prompt and completion the completion: data.loss_on: assistant)"
    yield default("data.loss_on", "all", text)
    yield default("train.learning_rate", 2e-5, "learning_rate")
    yield default("train.gradient_checkpointing", True, "gradient_checkpointing")
    yield from trainer_defaults(fields, logging_steps=10)


DECIDED = {
    SEVERAL: "num_processes config_file accelerate_config",
    "rows of an evaluation are not packed": "eval_packing",
    "rows are padded to the longest of a batch": "pad_to_multiple_of",
    "padding is neither seen nor learnt, whatever its token": "pad_token",
    "rows are drawn anew in each epoch": "shuffle_dataset",
    "always a causal language model": "lora_task_type",
    "packed weights lie in bytes, which changes none": "bnb_4bit_quant_storage",
    "one process": "ignore_bias_buffers",
}
REMEDIES = {
    "the tokenizer's own end token is used: save the model with such a tokenizer": "eos_token",
    "save the rows as a file": "dataset_streaming streaming",
    "set them in the shell that runs qft": "env",
}
TABLE: dict[str, Rule] = {
    **TRAINER,
    **SCRIPTS,
    **many(DECIDED, decided),
    **many(REMEDIES, refused),
    **many(
        {"of another trainer than SFT; qft learns from demonstrations: train on the chosen answers": OTHER_TRAINERS},
        refused,
    ),
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "model_init_kwargs": loading,
    "dtype": dtype,
    "torch_dtype": dtype,
    "attn_implementation": attention,
    "use_peft": peft,
    "lora_r": for_lora("adapter.r"),
    "lora_alpha": for_lora("adapter.lora_alpha"),
    "lora_dropout": for_lora("adapter.lora_dropout"),
    "lora_target_modules": for_lora("", targets),
    "lora_target_parameters": for_lora("", experts),
    "lora_modules_to_save": for_lora("adapter.modules_to_save"),
    "use_rslora": for_lora("adapter.use_rslora"),
    "use_dora": for_lora("adapter.use_dora"),
    "load_in_4bit": held("4bit"),
    "load_in_8bit": held("8bit"),
    "bnb_4bit_quant_type": decided("with load_in_4bit: quant.quant_type"),
    "use_bnb_nested_quant": decided("with load_in_4bit: quant.double_quant"),
    "router_aux_loss_coef": to("train.router_aux_loss_coef"),
    "dataset_name": dataset,
    "dataset_config": configuration,
    "dataset_train_split": decided("with dataset_name: data.train.split"),
    "dataset_test_split": decided("with dataset_name and eval_strategy: data.eval.split"),
    "datasets": mixture,
    "dataset_text_field": text_field,
    "dataset_num_proc": processes("data.num_proc"),
    "chat_template_path": template,
    "max_length": length,
    "loss_type": loss,
    "packing_strategy": packing_strategy,
    "dataset_kwargs": preparation,
    "test_split_size": held_out,
    "packing": to("data.packing"),
    "padding_free": to("data.padding_free"),
    "max_seq_length": to("data.max_length", text="as trl before 0.20 has it"),
    "truncation_mode": truncation,
    "completion_only_loss": completion,
    "assistant_only_loss": assistant,
    "activation_offloading": when_on(
        lambda key, value, config: [
            Line(key, Kind.OTHER_FIELD, "with train.gradient_checkpointing", {"memory.checkpoints": "host"})
        ]
    ),
    "project": ignored("trackio's own"),
}
