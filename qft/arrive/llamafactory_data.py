"""The rows of a LLaMA-Factory configuration: names that its dataset_info.json explains."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qft.arrive.line import Config, Kind, Line, Rule, sets
from qft.errors import RecipeError

INFO = "dataset_info.json"
BESIDE = {"system": "system", "history": "history", "tools": "tools", "images": "images"}
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", **BESIDE},
    "sharegpt": {"messages": "conversations", **BESIDE},
    "openai": {"messages": "messages", **BESIDE},
    "text": {"prompt": "text"},
}
"""Column -> the name that qft reads it by; one that is not listed is not read."""
TAGS: dict[str, dict[str, str]] = {
    "sharegpt": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
                 "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"},
    "openai": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
               "observation_tag": "tool", "function_tag": "tool_calls", "system_tag": "system"},
}  # fmt: skip
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
MIXED: Mapping[str, Callable[[Iterable[float]], float]] = {"interleave_under": min, "interleave_over": max}
"""Ways to mix data sets by shares -> which of them ends it."""
RENAME = "rename the fields in the rows, as docs/rows.md has them"


def between_commas(value: Any) -> list[str]:
    """What is listed, or stands between commas."""
    return [str(name) for name in value] if isinstance(value, list) else [n.strip() for n in str(value).split(",")]


def sources(field: str) -> Rule:
    """The rule of `dataset` (data.train) and `eval_dataset` (data.eval)."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        names = between_commas(value)
        info = _info(config)
        found: list[dict[str, Any]] = []
        for name in names:
            yield _source(f"{key}.{name}", info.get(name), config, found, cut=field == "data.train")
        if found:
            weights = _interleaved(found, config) if field == "data.train" else None
            for source, weight in zip(found, weights or [], strict=False):
                source["weight"] = weight
            yield Line(key, Kind.OTHER_FIELD, f"as {INFO} has them", {field: found})

    return sets(field)(rule)


def mixing(key: str, value: Any, config: Config) -> Iterator[Line]:
    """How the rows of several data sets make one."""
    names = config.get("dataset", "")
    several = len(names if isinstance(names, list) else str(names).split(",")) > 1
    if value in ("concat", "interleave_once") or (value in MIXED and not several):
        yield Line(key, Kind.SAME, "each row once, in an order that is drawn")
    elif value in MIXED:
        info = _info(config)
        found: list[dict[str, Any]] = []
        for name in between_commas(names):
            _source(name, info.get(name), config, found, cut=True)
        told = bool(_interleaved(found, config))
        text = (
            "as weights of the sources, by the sizes of their files"
            if told
            else ("the sizes of the files are not known here: give each source its weight in data.train")
        )
        yield Line(key, Kind.OTHER_FIELD if told else Kind.UNSUPPORTED, text)
    else:
        yield Line(key, Kind.UNSUPPORTED, "LLaMA-Factory takes no such value: correct it")


def _interleaved(found: list[dict[str, Any]], config: Config) -> list[float] | None:
    """The weights of the sources that are mixed until the first, or the last, has no more rows; None: as they are."""
    ends = MIXED.get(str(config.get("mix_strategy", "concat")))
    sizes = [_count(Path(source["path"])) for source in found]
    shares = between_commas(config.get("interleave_probs") or ",".join("1" for _ in found))
    if ends is None or len(found) < 2 or len(shares) != len(found) or not all(sizes):
        return None
    whole = [size for size in sizes if size]
    total = sum(map(float, shares))
    parts = [float(share) / total for share in shares]
    rows = ends(size * source.get("weight", 1) / part for size, source, part in zip(whole, found, parts, strict=True))
    return [round(part * rows / size, 6) for part, size in zip(parts, whole, strict=True)]


def _info(config: Config) -> Mapping[str, Any]:
    """What dataset_info.json says, with the folder of each file: looked for beside the configuration, and upwards."""
    folder = str(config.get("dataset_dir", "data"))
    for base in (Path.cwd(), *config.path.resolve().parents):
        path = base / os.path.expanduser(folder) / INFO
        if os.path.isfile(path):  # where a path is none, too
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
        return _unexplained(key, str(config.get("dataset_dir", "data")), found)
    form = _form(entry, config)
    path = _path(entry)
    problem = _problem(entry, form) or (
        "" if path else "it is made by code, or on another hub: save the rows as .jsonl"
    )
    if problem or form is None or path is None:
        found.extend([{"path": path}] if path and problem.startswith(RENAME) else [])
        return Line(key, Kind.UNSUPPORTED, problem)
    source: dict[str, Any] = {"path": path, "format": form}
    source |= {"name": entry["subset"]} if entry.get("subset") else {}
    source |= {"columns": _renamed(entry, form)} if _renamed(entry, form) else {}
    is_hub = "file_name" not in entry
    if is_hub and entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    most = config.get("max_samples") if cut else None
    text, shortened = _shortened(source, most or entry.get("num_samples"), is_hub)
    found.append(source | shortened)
    if text is None:
        text = f"max_samples: the file is not here: give data.train.weight, the share of its rows that {most} are"
        return Line(key, Kind.UNSUPPORTED, text)
    joined = (
        "; an input follows the instruction after an empty line, there after a line break" if form == "alpaca" else ""
    )
    pictures = "; images are sized by the model's own processor" if "images" in (entry.get("columns") or {}) else ""
    return Line(key, Kind.OTHER_FIELD, f"{text}{joined}{pictures}".strip("; "))


def _unexplained(key: str, folder: str, found: list[dict[str, Any]]) -> Line:
    """The line of a name that no dataset_info.json has: a data set of the hub, or the file that it will be."""
    name = key.partition(".")[2]
    if folder == "ONLINE":
        found.append({"path": name, "format": "alpaca"})
        return Line(key, Kind.OTHER_FIELD, "a data set of the hub, with rows as Alpaca's")
    local = f"{folder}/{name}.json" if ":" not in folder else f"{name}.json"
    found.append({"path": local})
    return Line(key, Kind.UNSUPPORTED, f"no {folder}/{INFO} explains it: name its file in data.train, or put it there")


def _form(entry: Mapping[str, Any], config: Config) -> str | None:
    """The rows' format, by how they are laid out: OpenAI's, where sharegpt is told such tags."""
    formatting = entry.get("formatting", "alpaca")
    if config.get("stage") == "pt":
        return "text" if formatting == "alpaca" else None
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if formatting == "sharegpt" and tags.get("role_tag") == "role":
        return "messages"
    if formatting == "alpaca" and list(columns) == ["prompt"]:
        return "text"
    return FORMATS.get(formatting)


def _problem(entry: Mapping[str, Any], form: str | None) -> str:
    """Why the rows cannot be read as they are; empty if they can."""
    if entry.get("ranking"):
        return "pairs of answers: train on the chosen ones"
    if form is None:
        return RENAME
    like = _like(form)
    if like == "text":
        return ""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if {"videos", "audios", "kto_tag", "chosen"} & columns.keys():
        return "rows of text and images alone: videos, audios and judged answers are not read"
    wrong = [
        name for name in ("messages", "prompt", "query", "response") if name in columns and name not in COLUMNS[like]
    ]
    wrong += [name for name, mine in tags.items() if TAGS.get(like, {}).get(name, mine) != mine]
    return f"{RENAME}: {', '.join(wrong)}" if wrong else ""


def _like(form: str) -> str:
    return {"messages": "openai"}.get(form, form)


def _renamed(entry: Mapping[str, Any], form: str) -> dict[str, str]:
    """What the rows call a field -> what the format does."""
    ours = COLUMNS[_like(form)]
    columns = entry.get("columns") or ({"prompt": "instruction"} if form == "text" else {})
    return {mine: ours[name] for name, mine in columns.items() if name in ours and mine != ours[name]}


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
