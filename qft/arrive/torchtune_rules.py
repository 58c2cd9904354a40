"""What becomes of torchtune's components: models, data sets, optimizers and schedules by the names of functions."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import Config, Kind, Line, sets

ALPACA = {"format": "alpaca"}
DATASETS: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", ALPACA, True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", ALPACA, True),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", {"format": "sharegpt"}, False),
    "chat_dataset": (None, {}, False),
    "text_completion_dataset": (None, {"format": "text"}, True),
}
"""Builder -> the hub data set that it stands for, the source's fields, and whether prompts are learnt by default."""
STYLES = {"sharegpt": "sharegpt", "openai": "messages"}
COLUMNS = {"sharegpt": "conversations", "openai": "messages"}
FUSED = ("phi3", "phi4")
"""Families whose checkpoints have one layer for what torchtune has several."""
NAMES = {"output_proj": "o_proj"}


def leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they have; mappings are walked into."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def interpolated(value: Any, found: Mapping[str, Any]) -> Any:
    """With what ${key} stands for."""
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"\$\{([\w.]+)\}", value)
    if whole:
        return found.get(whole[1], value)
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(found.get(match[1], match[0])), value)


@sets("quant.mode", "adapter.kind")
def model(key: str, value: Any, config: Config) -> Iterator[Line]:
    builder = str(value).rpartition(".")[2]
    if "vision" in str(value) or "llama4" in str(value):
        yield Line(key, Kind.UNSUPPORTED, "qft reads rows of text")
    elif builder.startswith("qlora_"):
        held = {"quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": True}
        text = "nf4 in blocks of 64 with quantized scales, by bitsandbytes instead of torchao"
        yield Line(key, Kind.OTHER_FIELD, text, held)
    elif builder.startswith("lora_"):
        yield Line(key, Kind.OTHER_FIELD, "the model's files say which it is", {"adapter.kind": "lora"})
    else:
        yield Line(key, Kind.OTHER_FIELD, "all weights are trained", {"adapter.kind": "none"})


@sets("quant.mode")
def quantized(key: str, value: Any, config: Config) -> Iterator[Line]:
    fields = {"quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": True} if value else {}
    yield Line(key, Kind.OTHER_FIELD if value else Kind.SAME, "" if value else "off, as here", fields)


@sets("adapter.target_modules")
def attention_modules(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Of attention and, with apply_lora_to_mlp, of the MLP, by the names that transformers has for them."""
    if any(name in str(config.get("model._component_")) for name in FUSED):
        names = ["qkv_proj"] if {"q_proj", "k_proj", "v_proj"} & set(value) else []
        names += ["o_proj"] if "output_proj" in value else []
        names += ["gate_up_proj", "down_proj"] if config.get("model.apply_lora_to_mlp") else []
        text = "the checkpoint has query, key and value in one layer, and gate and up: they get one adapter each"
        yield Line(key, Kind.DECIDED, text, {"adapter.target_modules": names})
        return
    names = [NAMES.get(name, name) for name in value]
    names += ["gate_proj", "up_proj", "down_proj"] if config.get("model.apply_lora_to_mlp") else []
    yield Line(key, Kind.OTHER_FIELD, sets={"adapter.target_modules": names})


def with_modules(key: str, value: Any, config: Config) -> Iterator[Line]:
    if key.endswith("to_output") and value:
        yield Line(key, Kind.UNSUPPORTED, "the head is left as it is, or trained in full: adapter.modules_to_save")
    else:
        yield Line(key, Kind.OTHER_FIELD if value else Kind.SAME, "with model.lora_attn_modules")


def prompt_template(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.UNSUPPORTED, "write it as a Jinja file, and name that as data.chat_template")


@sets("data.train")
def dataset(key: str, value: Any, config: Config) -> Iterator[Line]:
    builder = str(value).rpartition(".")[2]
    if builder not in DATASETS:
        yield Line(key, Kind.UNSUPPORTED, "name the rows as data.train: messages, alpaca, or prompt and completion")
        return
    hub, fields, all_learnt = DATASETS[builder]
    style = config.get("dataset.conversation_style", "sharegpt")
    if builder == "chat_dataset":
        fields = {"format": STYLES.get(style, "auto")}
    wrong = _renamed(builder, style, config)
    path = config.get("dataset.source", hub)
    files = config.get("dataset.data_files")
    path = (files if path in ("json", "csv", "parquet", "text") else None) if files else path
    if wrong or not isinstance(path, str):
        text = wrong or "a file within a hub data set: download it, and name it as data.train"
        yield Line(key, Kind.UNSUPPORTED, text)
        return
    source = {"path": path, **fields}
    name = config.get("dataset.name") or config.get("dataset.subset")
    source |= {"name": name} if name else {}
    split = config.get("dataset.split", "train")
    train = source if split == "train" or files else {**source, "split": split}
    made: dict[str, Any] = {"data.train": [train]}
    if not {"dataset.train_on_input", "dataset.masking_strategy"} & config.values.keys():
        made["data.loss_on"] = "all" if all_learnt else "assistant"
    if builder.startswith("alpaca"):
        made["data.chat_template"] = "alpaca.jinja"
    if config.get("dataset_val._component_") == value:
        made["data.eval"] = [{**source, "split": config.get("dataset_val.split", "validation")}]
    yield Line(key, Kind.OTHER_FIELD, _said(builder, all_learnt), made)


def _said(builder: str, all_learnt: bool) -> str:
    learnt = "the prompt is learnt, too, by its default" if all_learnt and "alpaca" in builder else ""
    joined = "an input follows the instruction without a heading of its own" if "alpaca" in builder else ""
    return "; ".join(text for text in (learnt, joined) if text)


def _renamed(builder: str, style: str, config: Config) -> str:
    """Why the columns cannot be read by their names; empty if they can."""
    column = config.get("dataset.conversation_column", COLUMNS.get(style, "conversations"))
    if config.get("dataset.column_map") or config.get("dataset.column", "text") != "text":
        return "rename the columns in the rows"
    if builder == "chat_dataset" and (style not in STYLES or column != COLUMNS[style]):
        return "rename the columns in the rows: conversations (from, value) or messages (role, content)"
    return ""


@sets("train.eval_strategy")
def validation(key: str, value: Any, config: Config) -> Iterator[Line]:
    fields = {"train.eval_strategy": "steps", "train.eval_steps": value}
    yield Line(key, Kind.OTHER_FIELD, sets=fields)


@sets("train.max_steps")
def most_steps(key: str, value: Any, config: Config) -> Iterator[Line]:
    text = f"train.max_steps is {value * config.get('epochs', 1)} then" if isinstance(value, int) else ""
    yield Line(key, Kind.OTHER_FIELD, text, {"train.max_steps": value * config.get("epochs", 1)})


@sets("train.optim")
def optimizer(key: str, value: Any, config: Config) -> Iterator[Line]:
    fused = bool(config.get("optimizer.fused", False))
    names = {
        "torch.optim.AdamW": "adamw_torch_fused" if fused else "adamw_torch",
        "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
        "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
        "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
        "torch.optim.SGD": "sgd",
    }
    if value in names:
        yield Line(key, Kind.OTHER_FIELD, sets={"train.optim": names[value]})
    else:
        yield Line(key, Kind.UNSUPPORTED, "train.optim names the optimizers; adamw_8bit holds as little")


def fused(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, "with optimizer._component_")


@sets("train.adam_beta1", "train.adam_beta2")
def betas(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, sets={"train.adam_beta1": value[0], "train.adam_beta2": value[1]})


@sets("train.lr_scheduler_type")
def scheduler(key: str, value: Any, config: Config) -> Iterator[Line]:
    if str(value).endswith("get_cosine_schedule_with_warmup"):
        yield Line(key, Kind.OTHER_FIELD, sets={"train.lr_scheduler_type": "cosine"})
    else:
        yield Line(key, Kind.UNSUPPORTED, "train.lr_scheduler_type names the shapes that there are")
