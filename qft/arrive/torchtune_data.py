"""The rows of a torchtune configuration: data sets by the names of the functions that build them."""

import os
from collections.abc import Iterator
from typing import Any

from qft.arrive.line import Config, Kind, Line, sets
from qft.arrive.shared import LOADERS, is_file, part_of_file, within

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
INSIDE = "a file within a hub data set: download it to where data.train has it"
SAMSUM = {"input": "dialogue", "output": "summary"}


@sets("data.train")
def dataset(key: str, value: Any, config: Config) -> Iterator[Line]:
    builder = str(value).rpartition(".")[2]
    hub, fields, all_learnt = DATASETS.get(builder, (OTHERS.get(builder), {}, False))
    cleaned = builder == "alpaca_dataset" and config.get("dataset.use_clean")
    path = config.get("dataset.source", DATASETS["alpaca_cleaned_dataset"][0] if cleaned else hub)
    files = config.get("dataset.data_files") or []
    files = files if isinstance(files, list) else [files]
    path = config.get("dataset.data_dir", path) if path in LOADERS and not files else path
    inside = bool(files) and path not in LOADERS and not all(os.path.isabs(str(file)) for file in files)
    paths = [str(each) for each in files or [path] if each]
    wrong = INSIDE if inside else _unread(builder, config)
    if not paths:
        yield Line(key, Kind.UNSUPPORTED, wrong or "names no data set")
        return
    if builder == "chat_dataset":
        fields = {"format": STYLES.get(_style(config), "auto")}
    columns = _columns(builder, config)
    source = {**fields, **({"columns": columns} if columns else {})}
    name = config.get("dataset.name") or config.get("dataset.subset")
    source |= {"name": name} if name else {}
    split = config.get("dataset.split", "train")
    of_file = any(map(is_file, paths))
    named = {} if split == "train" or of_file else {"split": split}
    made: dict[str, Any] = {"data.train": [one for each in paths for one in within({"path": each, **source, **named})]}
    if builder in DATASETS and not {"dataset.train_on_input", "dataset.masking_strategy"} & config.values.keys():
        made["data.loss_on"] = "all" if all_learnt else "assistant"
    if builder.startswith("alpaca"):
        made["data.chat_template"] = "alpaca.jinja"
    if config.get("dataset_val._component_") == value:
        held = {"split": config.get("dataset_val.split", "validation")}
        made["data.eval"] = [one for each in paths for one in within({"path": each, **source, **held})]
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
