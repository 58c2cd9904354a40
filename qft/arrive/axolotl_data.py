"""The rows of an Axolotl configuration: datasets and their types, as sources, a format and a chat template."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import Config, Kind, Line, sets

TYPES = {
    "alpaca": ("alpaca", "alpaca.jinja"),
    "alpaca:instruct": ("alpaca", "alpaca.jinja"),
    "alpaca:chat": ("alpaca", "alpaca-chat.jinja"),
    "alpaca:phi": ("alpaca", "alpaca-phi.jinja"),
    "alpaca:chatml": ("alpaca", "alpaca-chatml.jinja"),
    "sharegpt": ("sharegpt", None),
    "completion": ("text", None),
}
"""A dataset's type -> the rows' format, and the chat template that writes its prompt."""
WITH_INPUT = (
    "the prompt is that of rows without an input; an input follows the instruction after an empty line, without a "
    "heading of its own"
)
MESSAGES = {("messages", "role", "content"): "messages", ("conversations", "from", "value"): "sharegpt"}
"""field_messages and the names of role and content in a turn -> format."""
RENAME = "qft reads {'messages': [{'role', 'content'}]} or {'conversations': [{'from', 'value'}]}: rename the fields"
ONE_TEMPLATE = "one chat template renders all rows, and another source has another: train on them one after the other"

KEYS = {
    "name": "name",
    "split": "split",
    "revision": "revision",
}
LOADERS = ("json", "csv", "parquet", "text")
REMEDIES = {
    "shards": "give data.train.weight, the share of the rows that counts",
    "shards_idx": "give data.train.weight, the share of the rows that counts",
    "preprocess_shards": "rows are prepared by data.num_proc processes",
    "input_transform": "write the rows as they should be",
    "message_field_training": "which turns are learnt is the same for all rows: data.loss_on",
    "message_field_training_detail": "which turns are learnt is the same for all rows: data.loss_on",
    "split_thinking": "write the reasoning into the field that the chat template reads",
    "drop_system_message": "take the system turns out of the rows",
    "roles": "name the roles system, user, assistant or tool in the rows",
    "temperature": "qft distils with quant.distill alone",
    "logprobs_field": "qft distils with quant.distill alone",
    "field_human": "rename the field in the rows",
    "field_model": "rename the field in the rows",
    "field_tools": "rename the field to tools in the rows",
    "trust_remote_code": "qft runs no code of data sets: save the rows as .jsonl",
}


def sources(field: str) -> Any:
    """The rule of `datasets` (data.train) and `test_datasets` (data.eval)."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        found: list[dict[str, Any]] = []
        templates: list[str | None] = []
        for i, dataset in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(dataset, Mapping):
                yield Line(f"{key}.{i}", Kind.UNSUPPORTED, "a data set is a mapping with path and type")
                continue
            yield from _dataset(f"{key}.{i}", dataset, config, found, templates)
        if found:
            yield Line(key, Kind.OTHER_FIELD, sets={field: found})
        if field == "data.train" and templates and templates[0]:
            yield Line(key, Kind.OTHER_FIELD, WITH_INPUT, {"data.chat_template": templates[0]})

    return sets(field)(rule)


def _dataset(
    key: str, dataset: Mapping[str, Any], config: Config, found: list[dict[str, Any]], templates: list[str | None]
) -> Iterator[Line]:
    form, template, line = _form(key, dataset)
    yield line
    if form is None:
        return
    if form != "text" and templates and templates[0] != template:
        yield Line(f"{key}.path", Kind.UNSUPPORTED, ONE_TEMPLATE)
        return
    if form != "text":
        templates.append(template)
    made = {KEYS[name]: dataset[name] for name in KEYS if dataset.get(name) is not None}
    yield from (Line(f"{key}.{name}", Kind.SAME) for name in made)
    yield from _others(key, dataset)
    found.extend({"path": config.local(path), "format": form, **made} for path in _paths(dataset))
    files = "data_files" if dataset.get("data_files") else "path"
    if not _paths(dataset):
        text = "a file within a hub data set: download it, and name it as path"
        yield Line(f"{key}.{files}", Kind.UNSUPPORTED, text)
    else:
        yield Line(f"{key}.path", Kind.SAME)
        yield from [Line(f"{key}.data_files", Kind.OTHER_FIELD)] if files == "data_files" else []
        yield from [Line(f"{key}.ds_type", Kind.OTHER_FIELD, "by the file's suffix")] if dataset.get("ds_type") else []


def _paths(dataset: Mapping[str, Any]) -> list[str]:
    """The files or the hub data set; none if it is a file of one on the hub."""
    path, files = str(dataset.get("path", "")), dataset.get("data_files") or []
    files = files if isinstance(files, list) else [files]
    if not files:
        return [path] if path else []
    if os.path.isdir(path):
        return [os.path.join(path, str(file)) for file in files]
    return [str(file) for file in files] if path in LOADERS else []


def _form(key: str, dataset: Mapping[str, Any]) -> tuple[str | None, str | None, Line]:
    """Format, chat template and the line of the type."""
    kind = dataset.get("type")
    where = f"{key}.type"
    if kind in ("chat_template", "chat_template.default"):
        return _turns(key, dataset)
    if not isinstance(kind, str) or kind not in TYPES:
        text = "write the rows as messages (role and content), or as prompt and completion"
        return None, None, Line(where, Kind.UNSUPPORTED, text)
    form, template = TYPES[kind]
    if form == "text" and dataset.get("field") not in (None, "text"):
        return None, None, Line(f"{key}.field", Kind.UNSUPPORTED, "rename the field to text in the rows")
    text = "a longer text is cut into rows of sequence_len there: see data.on_too_long" if form == "text" else ""
    return form, template, Line(where, Kind.OTHER_FIELD, text, {})


def _turns(key: str, dataset: Mapping[str, Any]) -> tuple[str | None, str | None, Line]:
    mapping = dataset.get("message_property_mappings") or {}
    role = mapping.get("role") or dataset.get("message_field_role") or "role"
    content = mapping.get("content") or dataset.get("message_field_content") or "content"
    messages = dataset.get("field_messages") or "messages"
    form = MESSAGES.get((messages, role, content))
    others = {name: mine for name, mine in mapping.items() if name not in ("role", "content") and name != mine}
    if form is None or others:
        return None, None, Line(f"{key}.field_messages", Kind.UNSUPPORTED, RENAME)
    return form, None, Line(f"{key}.type", Kind.OTHER_FIELD, f"format {form}")


def _others(key: str, dataset: Mapping[str, Any]) -> Iterator[Line]:
    """Lines of the keys that name no place."""
    for name, value in dataset.items():
        where = f"{key}.{name}"
        if name in ("path", "type", "data_files", "ds_type", *KEYS):
            continue
        if value is None or value is False or value == []:
            yield Line(where, Kind.NO_EFFECT, "empty: as if it were not there")
        elif name in REMEDIES:
            yield Line(where, Kind.UNSUPPORTED, REMEDIES[name])
        elif name in ("field_messages", "message_property_mappings", "message_field_role", "message_field_content"):
            yield Line(where, Kind.OTHER_FIELD, "by the format")
        elif name == "field":
            yield Line(where, Kind.SAME)
        else:
            yield _learnt(where, name, value, dataset)


def _learnt(where: str, name: str, value: Any, dataset: Mapping[str, Any]) -> Line:
    """Which tokens are learnt, and what the template gets."""
    if name == "roles_to_train":
        mine = set(value) <= {"assistant", "gpt"}
        return Line(where, Kind.SAME if mine else Kind.UNSUPPORTED, "" if mine else "data.loss_on all learns all turns")
    if name in ("train_on_eos", "train_on_eot"):
        mine = value == "turn"
        return Line(where, Kind.SAME if mine else Kind.UNSUPPORTED, "set data.train_on_eos, for all rows")
    if name in ("field_thinking", "template_thinking_key"):
        mine = dataset.get("field_thinking") == dataset.get("template_thinking_key")
        text = "the chat template gets it by its own name" if mine else "rename it to what the chat template reads"
        return Line(where, Kind.SAME if mine else Kind.UNSUPPORTED, text)
    if name in ("chat_template", "chat_template_jinja"):
        own = value == "tokenizer_default"
        return Line(
            where, Kind.SAME if own else Kind.UNSUPPORTED, "" if own else "give data.chat_template, for all rows"
        )
    if name == "conversation":
        return Line(where, Kind.DECIDED, "turns are rendered by the chat template")
    return Line(where, Kind.NO_EFFECT, "Axolotl knows no such key of a data set, and says nothing")
