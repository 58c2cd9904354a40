"""What becomes of torchtune's components: models, data sets, optimizers and schedules by the names of functions."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import Config, Kind, Line, sets
from qft.arrive.shared import LOADERS, is_file, part_of_file

ALPACA = {"format": "alpaca"}
ASKED = {"format": "prompt_completion"}
DATASETS: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", ALPACA, True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", ALPACA, True),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", {"format": "sharegpt"}, False),
    "chat_dataset": (None, {}, False),
    "text_completion_dataset": (None, {"format": "text"}, True),
    "instruct_dataset": (None, ASKED, False),
    "grammar_dataset": ("liweili/c4_200m", ASKED, False),
    "samsum_dataset": ("Samsung/samsum", ASKED, False),
}
"""Builder -> the hub data set that it stands for, the source's fields, and whether prompts are learnt by default."""
OTHERS = {
    "the_cauldron_dataset": "HuggingFaceM4/the_cauldron",
    "llava_instruct_dataset": "liuhaotian/LLaVA-Instruct-150K",
}
"""Builder of rows that are not read as they are -> the hub data set that it stands for."""
STYLES = {"sharegpt": "sharegpt", "openai": "messages"}
COLUMNS = {"sharegpt": "conversations", "openai": "messages"}
OURS = {"input": "prompt", "output": "completion"}
"""What torchtune calls the parts of rows that hold a question and an answer -> what the format does."""
WITHIN = "a file within a hub data set: download it to where data.train has it"
SAMSUM = {"input": "dialogue", "output": "summary"}
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
        text = "there the layers between images and text are trained, too; here adapters are those of the language part"
        yield Line(key, Kind.UNSUPPORTED, f"{text}: name others in adapter.target_modules, with adapter.target_towers")
    if builder.startswith("qlora_"):
        held = {"quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": True}
        text = "nf4 in blocks of 64 with quantized scales, by bitsandbytes instead of torchao"
        yield Line(key, Kind.OTHER_FIELD, text, held)
    elif builder.startswith("lora_"):
        yield Line(key, Kind.OTHER_FIELD, "the model's files say which it is", {"adapter.kind": "lora"})
    elif str(value).startswith("torchtune.models."):
        yield Line(key, Kind.OTHER_FIELD, "all weights are trained", {"adapter.kind": "none"})
    else:
        text = "what it builds is known to its code alone: set adapter, or adapter.kind: none to train all weights"
        yield Line(key, Kind.UNSUPPORTED, text)


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
    hub, fields, all_learnt = DATASETS.get(builder, (OTHERS.get(builder), {}, False))
    path = config.get("dataset.source", hub)
    files = config.get("dataset.data_files")
    within = bool(files) and path not in LOADERS
    path = files or path
    wrong = WITHIN if within else _unread(builder, config)
    if not isinstance(path, str):
        yield Line(key, Kind.UNSUPPORTED, wrong or "names no one file: list them in data.train")
        return
    if builder == "chat_dataset":
        fields = {"format": STYLES.get(_style(config), "auto")}
    columns = _columns(builder, config)
    source = {"path": path, **fields, **({"columns": columns} if columns else {})}
    name = config.get("dataset.name") or config.get("dataset.subset")
    source |= {"name": name} if name else {}
    split = config.get("dataset.split", "train")
    of_file = is_file(path)
    made: dict[str, Any] = {"data.train": [source if split == "train" or of_file else {**source, "split": split}]}
    if builder in DATASETS and not {"dataset.train_on_input", "dataset.masking_strategy"} & config.values.keys():
        made["data.loss_on"] = "all" if all_learnt else "assistant"
    if builder.startswith("alpaca"):
        made["data.chat_template"] = "alpaca.jinja"
    if config.get("dataset_val._component_") == value:
        made["data.eval"] = [{**source, "split": config.get("dataset_val.split", "validation")}]
    yield Line(key, Kind.OTHER_FIELD, _said(builder, all_learnt), made)
    if of_file and split != "train":
        yield part_of_file("dataset.split", split)
    if wrong:
        yield Line(key, Kind.UNSUPPORTED, wrong)


def _style(config: Config) -> str:
    return str(config.get("dataset.conversation_style", "sharegpt"))


def _unread(builder: str, config: Config) -> str:
    """Why the rows cannot be read as they are; empty if they can."""
    if builder not in DATASETS:
        return "the rows are read as their own fields say: messages, alpaca, or prompt and completion"
    if builder == "chat_dataset" and _style(config) not in STYLES:
        return "rename the columns in the rows: conversations (from, value) or messages (role, content)"
    return ""


def _columns(builder: str, config: Config) -> dict[str, str]:
    """What the rows call a field -> what the format does."""
    if builder == "chat_dataset":
        ours = COLUMNS.get(_style(config), "conversations")
        named = {ours: config.get("dataset.conversation_column", ours)}
    elif builder == "text_completion_dataset":
        named = {"text": config.get("dataset.column", "text")}
    else:
        inner = {name: config.get(f"dataset.column_map.{name}") for name in ("instruction", "input", "output")}
        given = {
            **(SAMSUM if builder == "samsum_dataset" else {}),
            **{name: mine for name, mine in inner.items() if mine},
        }
        asked = DATASETS.get(builder, (None, {}, False))[1] is ASKED
        named = {OURS[name]: given.get(name, name) for name in OURS} if asked else given
    return {str(mine): name for name, mine in named.items() if mine != name}


def _said(builder: str, all_learnt: bool) -> str:
    learnt = "the prompt is learnt, too, by its default" if all_learnt and "alpaca" in builder else ""
    joined = "an input follows the instruction without a heading of its own" if "alpaca" in builder else ""
    return "; ".join(text for text in (learnt, joined) if text)


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
