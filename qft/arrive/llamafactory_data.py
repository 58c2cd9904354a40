"""The rows of a LLaMA-Factory configuration: names that its dataset_info.json explains."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qft.arrive.line import Config, Kind, Line, Rule, sets
from qft.errors import RecipeError

INFO = "dataset_info.json"
COLUMNS: dict[str, dict[str, str | None]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "images": "images"},
    "sharegpt": {"messages": "conversations", "tools": "tools", "system": None, "images": "images"},
    "openai": {"messages": "messages", "tools": "tools", "images": "images"},
}
"""Column -> the name that qft reads it by; one that is not listed, or is None, has to be part of the rows."""
TAGS: dict[str, dict[str, str]] = {
    "sharegpt": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
                 "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"},
    "openai": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
               "observation_tag": "tool", "function_tag": "tool_calls", "system_tag": "system"},
}  # fmt: skip
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
RENAME = "rename the fields in the rows, as docs/rows.md has them"


def sources(field: str) -> Rule:
    """The rule of `dataset` (data.train) and `eval_dataset` (data.eval)."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
        info = _info(config)
        found: list[dict[str, Any]] = []
        for name in names:
            yield _source(f"{key}.{name}", info.get(name), config, found, cut=field == "data.train")
        if found:
            yield Line(key, Kind.OTHER_FIELD, f"as {INFO} has them", {field: found})

    return sets(field)(rule)


def _info(config: Config) -> Mapping[str, Any]:
    """What dataset_info.json says, with the folder of each file: looked for beside the configuration, and upwards."""
    folder = str(config.get("dataset_dir", "data"))
    for base in (Path.cwd(), *config.path.resolve().parents):
        path = base / os.path.expanduser(folder) / INFO
        if path.is_file():
            try:
                read = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise RecipeError(f"{path}: no JSON: {error}") from None
            entries = read.items() if isinstance(read, dict) else ()
            return {name: {**entry, "folder": path.parent} for name, entry in entries if isinstance(entry, dict)}
    return {}


def _source(key: str, entry: Any, config: Config, found: list[dict[str, Any]], cut: bool) -> Line:
    """The line of one name, whose source is added to those that are found."""
    if entry is None:
        folder = config.get("dataset_dir", "data")
        return Line(key, Kind.UNSUPPORTED, f"no {folder}/{INFO} explains it: name the file as data.train")
    form = _form(entry)
    path = _path(entry)
    problem = _problem(entry, form) or (
        "" if path else "it is made by code, or on another hub: save the rows as .jsonl"
    )
    if problem or form is None or path is None:
        return Line(key, Kind.UNSUPPORTED, problem)
    source: dict[str, Any] = {"path": path, "format": form}
    source |= {"name": entry["subset"]} if entry.get("subset") else {}
    is_hub = "file_name" not in entry
    if is_hub and entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    most = config.get("max_samples") if cut else None
    text, shortened = _shortened(source, most or entry.get("num_samples"), is_hub)
    if text is None:
        text = f"max_samples: the file has fewer rows, or give data.train.weight, the share of them that {most} are"
        return Line(key, Kind.UNSUPPORTED, text)
    found.append(source | shortened)
    joined = (
        "; an input follows the instruction after an empty line, there after a line break" if form == "alpaca" else ""
    )
    pictures = "; images are sized by the model's own processor" if "images" in (entry.get("columns") or {}) else ""
    return Line(key, Kind.OTHER_FIELD, f"{text}{joined}{pictures}".strip("; "))


def _form(entry: Mapping[str, Any]) -> str | None:
    """The rows' format, by how they are laid out: OpenAI's, where sharegpt is told such tags."""
    formatting = entry.get("formatting", "alpaca")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if formatting == "sharegpt" and columns.get("messages") == "messages":
        return "messages" if {**TAGS["sharegpt"], **tags}.get("role_tag") == "role" else None
    if formatting == "alpaca" and list(columns) == ["prompt"] and columns["prompt"] == "text":
        return "text"
    return FORMATS.get(formatting)


def _problem(entry: Mapping[str, Any], form: str | None) -> str:
    """Why the rows cannot be read as they are; empty if they can."""
    if entry.get("ranking"):
        return "pairs of answers: train on the chosen ones"
    if form is None:
        return RENAME
    like: str = {"messages": "openai"}.get(form, form)
    if like == "text":
        return ""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if {"videos", "audios", "kto_tag", "chosen"} & columns.keys():
        return "rows of text and images alone: videos, audios and judged answers are not read"
    wrong = [name for name, mine in columns.items() if COLUMNS[like].get(name) != mine]
    wrong += [name for name, mine in tags.items() if TAGS.get(like, {}).get(name) != mine]
    return f"{RENAME}: {', '.join(wrong)}" if wrong else ""


def _path(entry: Mapping[str, Any]) -> str | None:
    if "file_name" in entry:
        return str(entry["folder"] / entry["file_name"])
    return str(entry["hf_hub_url"]) if "hf_hub_url" in entry else None


def _shortened(source: Mapping[str, Any], most: int | None, is_hub: bool) -> tuple[str | None, dict[str, Any]]:
    """What makes `max_samples` of the rows, and how; no text if that cannot be known."""
    if not most:
        return "", {}
    if is_hub:
        return f"the first {most} rows", {"split": f"{source.get('split', 'train')}[:{most}]"}
    count = _count(Path(source["path"]))
    if count is None:
        return None, {}
    if count <= most:
        return f"all of its {count} rows, of {most} at most", {}
    return f"{most} of its {count} rows, drawn by the seed instead of the first", {"weight": most / count}


def _count(path: Path) -> int | None:
    """Rows of a JSON file; None for another, and one that is not here."""
    try:
        text = path.read_text("utf-8") if path.suffix in (".json", ".jsonl") else ""
        if path.suffix == ".jsonl":
            return sum(bool(line.strip()) for line in text.splitlines())
        return len(json.loads(text)) if text else None
    except (OSError, ValueError):
        return None
