"""What several tools' tables share."""

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import Config, Kind, Line, Rule, choose, fastest_attention, number, sets
from qft.recipe.spread import is_local, is_saved, kind

SEVERAL = (
    "distributed.strategy auto shares an update among the GPUs that are there, and shards the base where it must; for "
    "as many rows, multiply train.gradient_accumulation_steps by the number of GPUs"
)
"""What becomes of the settings for several GPUs."""
OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion_8bit": "lion_8bit",
    "lion_32bit": "lion_32bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Theirs -> ours. Those of torchao hold the same state in other blocks; see `optimizer`."""
OWN_TEMPLATE = "chat-template.jinja"
"""The file that a chat template becomes which a configuration has as text."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
LOADERS = ("json", "csv", "parquet", "text")
"""Names of data sets that are none: how the files beside them are read."""
TORCHAO = {"adamw_torch_8bit": "adamw_8bit", "adamw_torch_4bit": "adamw_8bit", "ao_adamw_8bit": "adamw_8bit"}


@sets("train.optim")
def optimizer(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value in TORCHAO:
        text = f"bitsandbytes' 8-bit AdamW stands for torchao's {value}: the same update, its state in 8 bits"
        yield Line(key, Kind.DECIDED, text, {"train.optim": TORCHAO[value]})
    else:
        yield from choose("train.optim", OPTIMIZERS, "train.optim adamw_8bit is the nearest that holds as little")(
            key, value, config
        )


def report_to(key: str, names: list[str], text: str = "") -> Line:
    """Where the curves are sent, of what is installed: they change nothing of the training."""
    here = [name for name in names if name not in TRACKERS or importlib.util.find_spec(name)]
    if here == names:  # the field itself says which it does not know
        return Line(key, Kind.SAME, text, {"train.report_to": names})
    away = ", ".join(name for name in names if name not in here)
    remedy = f"{away}: not installed here, and left out: pip install it, and set train.report_to: [{', '.join(names)}]"
    return Line(key, Kind.DECIDED, "; ".join(filter(None, [remedy, text])), {"train.report_to": here} if here else {})


@sets("data.chat_template")
def own_template(key: str, value: Any, config: Config) -> Iterator[Line]:
    """A chat template as text, which becomes a file, or the path of one."""
    if "{" in value:
        yield Line(key, Kind.OTHER_FIELD, "", {"data.chat_template": OWN_TEMPLATE}, templates={OWN_TEMPLATE: value})
    else:
        yield Line(key, Kind.OTHER_FIELD, sets={"data.chat_template": config.local(value)})


@sets("adapter.target_experts")
def experts(key: str, value: Any, config: Config) -> Iterator[Line]:
    names = [value] if isinstance(value, str) else value
    if all(str(name).rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in names):
        text = "all parameters of the experts, on those that hold a layer's"
        yield Line(key, Kind.OTHER_FIELD, text, {"adapter.target_experts": True})
    else:
        yield Line(key, Kind.UNSUPPORTED, "adapter.target_experts adapts the experts of a mixture, all or none")


def said_to_shell(key: str, value: Any, config: Config) -> Iterator[Line]:
    """What a tracker reads in the environment, and no training does."""
    yield Line(key, Kind.DECIDED, f"set {key.upper()}={value} in the environment: a tracker reads it there")


def resumed(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Whether, or from which checkpoint, a run of theirs goes on."""
    if isinstance(value, str) and value.lower() not in ("true", "false", "latest"):
        text = (
            "a run of another tool is not gone on with: merge its adapter into the model, and name that as model.path"
        )
        yield Line(key, Kind.UNSUPPORTED, text)
    else:
        yield Line(key, Kind.DECIDED, "qft train --resume goes on where a run ended")


def pushed(key: str, value: Any, config: Config) -> Iterator[Line]:
    """An upload, of which the hub's name is in `hub_model_id`."""
    name = config.get("hub_model_id") or "OWNER/NAME"
    run = config.get("output_dir") or "RUN"
    yield Line(key, Kind.UNSUPPORTED, f"upload it afterwards: qft export {run} --to adapter --push-to-hub {name}")


def processes(field: str) -> Rule:
    """How many prepare rows, which changes none of them."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        if isinstance(value, int) and value > max(64, 4 * (os.cpu_count() or 1)):
            yield Line(key, Kind.DECIDED, f"more than this machine is for: {field} says how many")
        else:
            yield Line(key, Kind.SAME, sets={field: value})

    return sets(field)(rule)


def of_model(model: str, remedy: str) -> Rule:
    """Where a tokenizer or a configuration is, if that is not where the model is."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        same = str(value).rstrip("/") == str(config.get(model)).rstrip("/")
        text = "the model's own" if same else f"the model's own is taken: {remedy} if this is another"
        yield Line(key, Kind.SAME if same else Kind.UNSUPPORTED, text)

    return rule


def beside(other: str, kind: Kind = Kind.OTHER_FIELD) -> Rule:
    """Read with another key alone, whose line says what becomes of it."""
    return lambda key, value, config: (
        [Line(key, kind, f"with {other}")]
        if config.get(other)
        else [Line(key, Kind.NO_EFFECT, f"is read only with {other}")]
    )


def steps(field: str) -> Rule:
    """A number of steps, or below 1 a share of all."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        share, most = number(value), number(config.get("max_steps", 0))
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            yield Line(key, Kind.SAME, sets={field: value})
        elif isinstance(most, int | float) and most > 0:
            yield Line(key, Kind.OTHER_FIELD, "of max_steps", {field: math.ceil(share * most)})
        else:
            text = f"a share of all steps, which are not known before the rows are: give a number as {field}"
            epoch = "" if "logging" in field else f", or set {field.replace('_steps', '_strategy')}: epoch"
            yield Line(key, Kind.UNSUPPORTED, text + epoch)

    return sets(field)(rule)


@sets("data.eval_fraction")
def held_out(key: str, value: Any, config: Config) -> Iterator[Line]:
    share = number(value)
    if not share:
        yield Line(key, Kind.SAME, "off, as here")
    elif share < 1:
        yield Line(key, Kind.OTHER_FIELD, "other rows are drawn", {"data.eval_fraction": share})
    else:
        yield Line(key, Kind.UNSUPPORTED, "a number of rows: give their share as data.eval_fraction")


@sets("model.attn_implementation")
def attention(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value in ("eager", "sdpa", "flex_attention"):
        yield Line(key, Kind.SAME, sets={"model.attn_implementation": value})
    else:
        yield fastest_attention(key)


def is_place(path: str) -> bool:
    """Whether it can be no hub dataset, whatever lies there."""
    return os.path.isdir(path) or os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1


def is_file(path: Any) -> bool:
    """Whether rows are all that lies at a path: no hub dataset, nor what `datasets` saved with its splits."""
    return is_local(str(path)) and not is_saved(str(path))


SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "testing|evaluation|eval|test",
}
"""A split -> what the files of a folder that are read as it have in their names."""


def within(source: Mapping[str, Any], split: str = "train") -> list[dict[str, Any]]:
    """A source; of a folder whose files are those of several splits, those of its own."""
    path, named = str(source["path"]), str(source.get("split") or split)
    if not is_place(path) or is_saved(path) or "[" in named or kind(path):
        return [dict(source)]
    rest = {name: value for name, value in source.items() if name != "split" and (name, value) != ("name", "default")}
    if not os.path.isdir(path):
        asked = {"path": f"{path}/*{SPLITS.get(named, named).rpartition('|')[2]}*"} if named != "train" else {}
        return [{**rest, **asked}]
    names = sorted(name for name in os.listdir(path) if is_local(name)) if os.access(path, os.R_OK) else []
    mine = [name for name in names if _is_of(name, SPLITS.get(named, re.escape(named)))]
    others = any(_is_of(name, words) for name in names for words in SPLITS.values())
    if mine:
        return [{**rest, "path": os.path.join(path, name)} for name in mine]
    return [rest if named == "train" and not others else dict(source)]


def _is_of(name: str, words: str) -> bool:
    return bool(re.search(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)", name.lower()))


def part_of_file(key: str, split: Any) -> Line:
    """Of a split of what has none but `train`."""
    if split == "train":
        return Line(key, Kind.SAME, "all rows of the file")
    text = "all rows of a file are read: data.train.weight draws a share of them, or write those that are meant apart"
    return Line(key, Kind.UNSUPPORTED, text)
