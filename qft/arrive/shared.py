"""What several tools' tables share."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from qft.arrive.line import Config, Kind, Line, choose, fastest_attention, number, sets
from qft.recipe.spread import is_local, is_saved

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


def is_file(path: Any) -> bool:
    """Whether rows are all that lies at a path: no hub dataset, nor what `datasets` saved with its splits."""
    return is_local(str(path)) and not is_saved(str(path))


def part_of_file(key: str, split: Any) -> Line:
    """Of a split of what has none but `train`."""
    if split == "train":
        return Line(key, Kind.SAME, "all rows of the file")
    text = "all rows of a file are read: data.train.weight draws a share of them, or write those that are meant apart"
    return Line(key, Kind.UNSUPPORTED, text)
