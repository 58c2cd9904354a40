"""What several tools' tables share."""

from collections.abc import Iterator
from typing import Any

from qft.arrive.line import Config, Kind, Line, choose, fastest_attention, number, sets

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
