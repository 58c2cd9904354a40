"""The rows of an Axolotl configuration: datasets and their types, as sources, a format and a chat template."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.axolotl_forms import NAMED, OWN_PROMPT, WITH_INPUT, form
from qft.arrive.line import Config, Kind, Line, sets
from qft.arrive.shared import LOADERS, is_file, part_of_file, within

ONE_TEMPLATE = "one chat template renders all rows, and another source has another: train on them one after the other"

KEYS = ("name", "split", "revision")
"""Of a hub dataset, as qft calls them."""
ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt"),
    "system": ("system",),
    "tool": ("tool",),
}
"""What qft takes the names of roles for."""
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
            text = "" if templates[0] in (OWN_PROMPT, *NAMED.values()) else WITH_INPUT
            yield Line(key, Kind.OTHER_FIELD, text, {"data.chat_template": templates[0]})

    return sets(field)(rule)


def _dataset(
    key: str, dataset: Mapping[str, Any], config: Config, found: list[dict[str, Any]], templates: list[str | None]
) -> Iterator[Line]:
    rows = form(key, dataset, str(config.get("chat_template", "")))
    yield rows.line
    if rows.format != "text" and templates and templates[0] != rows.template:
        yield Line(f"{key}.path", Kind.UNSUPPORTED, ONE_TEMPLATE)
        return
    if rows.format != "text":
        templates.append(rows.template)
    paths, inside = _paths(dataset)
    asked = {name: dataset[name] for name in KEYS if dataset.get(name) is not None}
    of_file = any(map(is_file, paths))
    for name, value in asked.items():
        yield _of_file(f"{key}.{name}", value) if of_file else Line(f"{key}.{name}", Kind.SAME)
    yield from _others(key, dataset, config)
    for path in paths:
        found.extend(within({"path": config.local(path), **rows.source, **({} if of_file else asked)}))
    files = "data_files" if dataset.get("data_files") else "path"
    if inside or not paths:
        text = "a file within a hub data set: download it to where data.train has it" if inside else "names no data set"
        yield Line(f"{key}.{files}", Kind.UNSUPPORTED, text)
    else:
        yield Line(f"{key}.path", Kind.SAME)
        yield from [Line(f"{key}.data_files", Kind.OTHER_FIELD)] if files == "data_files" else []
        yield from [Line(f"{key}.ds_type", Kind.OTHER_FIELD, "by the file's suffix")] if dataset.get("ds_type") else []


def _of_file(key: str, value: Any) -> Line:
    """What KEYS say beside the path of a file."""
    is_split = key.endswith(".split")
    return part_of_file(key, value) if is_split else Line(key, Kind.NO_EFFECT, "a file has but one")


def _paths(dataset: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The files or the hub data set, and whether the files are within one."""
    path, files = str(dataset.get("path", "")), dataset.get("data_files") or []
    files = files if isinstance(files, list) else [files]
    if not files:
        return ([path] if path else []), False
    if os.path.isdir(path):
        return [os.path.join(path, str(file)) for file in files], False
    if is_file(path):
        return [path], False
    return [str(file) for file in files], path not in LOADERS and not all(os.path.isabs(str(file)) for file in files)


def _others(key: str, dataset: Mapping[str, Any], config: Config) -> Iterator[Line]:
    """Lines of the keys that name no place."""
    for name, value in dataset.items():
        where = f"{key}.{name}"
        if name in ("path", "type", "data_files", "ds_type", *KEYS):
            continue
        if value is None or value is False or value == []:
            yield Line(where, Kind.NO_EFFECT, "empty: as if it were not there")
        elif _is_our_role(name, value):
            yield Line(where, Kind.SAME)
        elif name in REMEDIES:
            yield Line(where, Kind.UNSUPPORTED, REMEDIES[name])
        elif name in ("field_messages", "message_property_mappings", "message_field_role", "message_field_content"):
            yield Line(where, Kind.OTHER_FIELD, "by the format")
        elif name == "field":
            yield Line(where, Kind.SAME)
        elif name in ("train_on_eos", "train_on_eot"):
            yield _ends(where, value, config)
        else:
            yield _learnt(where, name, value, dataset)


def _is_our_role(name: str, value: Any) -> bool:
    """Whether roles that are named are those that qft takes them for."""
    role = {"field_human": "user", "field_model": "assistant"}.get(name)
    named = {role: value} if role else value if name == "roles" else None
    if not isinstance(named, Mapping):
        return False
    lists = {mine: [each] if isinstance(each, str) else each for mine, each in named.items()}
    return all(set(each) <= set(ROLES.get(mine, ())) for mine, each in lists.items())


def _ends(where: str, value: Any, config: Config) -> Line:
    """Which ends are learnt: of all rows alike, so that every data set must say the same."""
    given = config.get("datasets")
    each = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Mapping)]
    said = {one.get("train_on_eos", one.get("train_on_eot", "turn")) for one in each}
    if value != "turn" and (value not in ("all", "last") or said != {value}):
        return Line(where, Kind.UNSUPPORTED, "set data.train_on_eos, for all rows")
    return Line(where, Kind.SAME, sets={"data.train_on_eos": value})


def _learnt(where: str, name: str, value: Any, dataset: Mapping[str, Any]) -> Line:
    """Which tokens are learnt, and what the template gets."""
    if name == "roles_to_train":
        mine = set(value) <= {"assistant", "gpt"}
        return Line(where, Kind.SAME if mine else Kind.UNSUPPORTED, "" if mine else "data.loss_on all learns all turns")
    if name in ("field_thinking", "template_thinking_key"):
        mine = dataset.get("field_thinking") == dataset.get("template_thinking_key")
        text = "the chat template gets it by its own name" if mine else "rename it to what the chat template reads"
        return Line(where, Kind.SAME if mine else Kind.UNSUPPORTED, text)
    if name in ("chat_template", "conversation") and (value in NAMED or value == "tokenizer_default"):
        return Line(where, Kind.SAME if value == "tokenizer_default" else Kind.OTHER_FIELD)
    if name in ("chat_template", "conversation"):
        text = f"the model's own chat template renders the turns: give {value} as data.chat_template if that is another"
        return Line(where, Kind.DECIDED, text)
    if name == "chat_template_jinja":
        return Line(where, Kind.UNSUPPORTED, "give data.chat_template, for all rows")
    return Line(where, Kind.NO_EFFECT, "Axolotl knows no such key of a data set, and says nothing")
