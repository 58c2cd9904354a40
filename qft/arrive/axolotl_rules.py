"""What becomes of Axolotl's keys that depend on one another, or take more than a field's value."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qft.arrive.line import Config, Kind, Line, Rule, number, sets
from qft.arrive.shared import own_template, report_to, steps

BNB = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8", "llm_int8_has_fp16_weight": False}
"""What bitsandbytes is told anyway."""
OFTEN = {"bos_token": "<s>", "eos_token": "</s>"}
"""What Llama 2, Mistral and their kin call these tokens."""
PROMPTED = "rows of that type are rendered by the prompt of the type"


@sets("adapter.kind")
def adapter(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value in ("lora", "qlora"):
        yield Line(key, Kind.OTHER_FIELD, sets={"adapter.kind": "lora"})
    else:
        yield Line(key, Kind.UNSUPPORTED, "adapter.kind lora is the one kind of adapter")


@sets("quant.mode")
def in_4bit(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value and config.get("adapter") == "lora":
        text = "Axolotl quantizes to 4 bits with adapter qlora alone; with lora the base stays in 16 bits"
        yield Line(key, Kind.NO_EFFECT, f"{text}: set quant.preset finetune if 4 bits were meant")
    elif value:
        extra = config.get("bnb_config_kwargs", {})
        double = extra.get("bnb_4bit_use_double_quant", True) if isinstance(extra, Mapping) else True
        held = {"quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": double}
        yield Line(key, Kind.OTHER_FIELD, "its packed weights lie in uint8, and not bfloat16, which changes none", held)
    else:
        yield Line(key, Kind.SAME, "off, as here")


@sets("quant.mode")
def in_8bit(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value and config.get("adapter") == "qlora":
        yield Line(key, Kind.UNSUPPORTED, "Axolotl refuses it beside adapter qlora: remove one of the two")
    elif value:
        yield Line(key, Kind.OTHER_FIELD, sets={"quant.mode": "8bit"})
    else:
        yield Line(key, Kind.SAME, "off, as here")


@sets("quant.quant_type", "quant.double_quant", "quant.compute_dtype", "quant.skip_modules")
def bnb_config(key: str, value: Any, config: Config) -> Iterator[Line]:
    names = {"bnb_4bit_quant_type": "quant.quant_type", "bnb_4bit_compute_dtype": "quant.compute_dtype"}
    for name, mine in value.items():
        if name == "bnb_4bit_use_double_quant":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, "with load_in_4bit")
        elif name == "llm_int8_skip_modules":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, sets={"quant.skip_modules": mine})
        elif name in names and name != "bnb_4bit_quant_type":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, sets={names[name]: mine})
        else:
            same = name in BNB and mine == BNB[name]
            yield Line(f"{key}.{name}", Kind.SAME if same else Kind.UNSUPPORTED, "" if same else "see quant")


@sets("adapter.target_modules")
def modules(key: str, value: Any, config: Config) -> Iterator[Line]:
    if config.get("lora_target_linear"):
        yield Line(key, Kind.NO_EFFECT, "lora_target_linear takes every linear layer already")
    else:
        yield Line(key, Kind.OTHER_FIELD, sets={"adapter.target_modules": value})


def a_time_or_more(strategy: str, what: str) -> Rule:
    """evals_per_epoch and saves_per_epoch."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        if strategy == "eval" and not (config.get("val_set_size") or config.get("test_datasets")):
            yield Line(key, Kind.NO_EFFECT, "no rows are held out")
            return
        steps = f"train.{strategy}_strategy steps and train.{strategy}_steps for more"
        often = Kind.OTHER_FIELD if value == 1 else Kind.DECIDED
        yield Line(
            key, often, "" if value == 1 else f"{what} once an epoch; {steps}", {f"train.{strategy}_strategy": "epoch"}
        )

    return sets(f"train.{strategy}_strategy", f"train.{strategy}_steps")(rule)


def steps_between(strategy: str) -> Rule:
    """eval_steps and save_steps."""

    def rule(key: str, value: Any, config: Config) -> Iterator[Line]:
        if strategy == "eval" and not (config.get("val_set_size") or config.get("test_datasets")):
            yield Line(key, Kind.NO_EFFECT, "no rows are held out")
        elif not number(value):
            yield Line(key, Kind.NO_EFFECT, "0: as if it were not there")
        else:
            for line in steps(f"train.{strategy}_steps")(key, value, config):
                yield replace(line, sets={**line.sets, f"train.{strategy}_strategy": "steps"}) if line.sets else line

    return sets(f"train.{strategy}_strategy", f"train.{strategy}_steps")(rule)


def batch_size(key: str, value: Any, config: Config) -> Iterator[Line]:
    rows = config.get("micro_batch_size", 1)
    if "gradient_accumulation_steps" in config.values:
        yield Line(key, Kind.NO_EFFECT, "gradient_accumulation_steps is given")
    else:
        yield Line(key, Kind.OTHER_FIELD, sets={"train.gradient_accumulation_steps": max(value // rows, 1)})


@sets("train.gradient_checkpointing")
def checkpointing(key: str, value: Any, config: Config) -> Iterator[Line]:
    fields: dict[str, Any] = {"train.gradient_checkpointing": bool(value)}
    if value in ("offload", "offload_disk"):
        fields["memory.checkpoints"] = "host"
    text = "on the host, not on disk" if value == "offload_disk" else ""
    yield Line(key, Kind.SAME if isinstance(value, bool) else Kind.OTHER_FIELD, text, fields)


def prompted(config: Config) -> bool:
    """Whether the rows' type writes the prompt, whatever the chat template is."""
    first = (config.get("datasets") or [{}])[0]
    kind = first.get("type") if isinstance(first, Mapping) else None
    return isinstance(kind, Mapping) or any(str(kind).startswith(name) for name in ("alpaca", "gpteacher"))


@sets("data.chat_template")
def jinja(key: str, value: Any, config: Config) -> Iterator[Line]:
    """A template as text, or the path of one."""
    if prompted(config):
        yield Line(key, Kind.NO_EFFECT, PROMPTED)
    else:
        yield from own_template(key, value, config)


@sets("data.chat_template")
def template(key: str, value: Any, config: Config) -> Iterator[Line]:
    if prompted(config):
        yield Line(key, Kind.NO_EFFECT, PROMPTED)
    elif value == "chatml":
        yield Line(key, Kind.OTHER_FIELD, sets={"data.chat_template": "chatml.jinja"})
    elif value in ("tokenizer_default", "jinja"):
        yield Line(key, Kind.SAME, "the model's own, or chat_template_jinja")
    else:
        text = "the model's own template renders the rows: give Axolotl's as data.chat_template if that is another"
        yield Line(key, Kind.DECIDED, text)


@sets("model.add_special_tokens")
def tokens(key: str, value: Any, config: Config) -> Iterator[Line]:
    for name, token in value.items():
        if token is None:
            yield Line(f"{key}.{name}", Kind.NO_EFFECT, "empty: as if it were not there")
        elif name == "pad_token":
            yield Line(f"{key}.{name}", Kind.DECIDED, "padding is neither seen nor learnt, whatever its token")
        elif name == "additional_special_tokens":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, sets={"model.add_special_tokens": token})
        elif name == "unk_token":
            yield Line(
                f"{key}.{name}", Kind.DECIDED, "a text is split as the tokenizer does it, whatever that is called"
            )
        else:
            yield _own_token(f"{key}.{name}", name, token, str(config.get("base_model")))


def _own_token(key: str, name: str, token: str, model: str) -> Line:
    """Of a token that begins or ends a text: compared with the tokenizer's where that is here."""
    try:
        told = json.loads((Path(model).expanduser() / "tokenizer_config.json").read_text("utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        text = f"taken to be the tokenizer's own, as Llama 2's and Mistral's {name} is: save the model with it if not"
        if token == OFTEN.get(name):
            return Line(key, Kind.DECIDED, text)
    else:
        if token == (told.get("content") if isinstance(told, Mapping) else told):
            return Line(key, Kind.SAME, "the tokenizer's own")
    text = "the tokenizer's own tokens are used: if this is another, save the model with such a tokenizer"
    return Line(key, Kind.UNSUPPORTED, text)


@sets("train.warmup_steps")
def warmup_ratio(key: str, value: Any, config: Config) -> Iterator[Line]:
    if config.get("warmup_steps") is not None:
        yield Line(key, Kind.NO_EFFECT, "warmup_steps is given")
    else:
        yield Line(key, Kind.OTHER_FIELD, sets={"train.warmup_steps": value})


def plugins(key: str, value: Any, config: Config) -> Iterator[Line]:
    ours = ("LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin")
    for i, name in enumerate(value):
        if str(name).rpartition(".")[2] in ours:
            yield Line(f"{key}.{i}", Kind.DECIDED, "kernels of qft's own (train.kernels, train.chunked_loss)")
        else:
            yield Line(f"{key}.{i}", Kind.UNSUPPORTED, "qft runs no code of Axolotl's plugins: remove it")


@sets("train.report_to")
def tracking(key: str, value: Any, config: Config) -> Iterator[Line]:
    where = {
        "use_wandb": "wandb", "wandb_project": "wandb", "use_mlflow": "mlflow", "mlflow_tracking_uri": "mlflow",
        "use_tensorboard": "tensorboard", "use_trackio": "trackio", "trackio_project_name": "trackio",
    }  # fmt: skip
    named = sorted({where[other] for other in where if config.get(other)})
    named = [name for name in named if config.get(f"use_{name}") is not False]
    by_shell = f"and {key.upper()}={value} in the environment" if not key.startswith("use_") else ""
    yield report_to(key, named, by_shell) if named else Line(key, Kind.OTHER_FIELD, by_shell)


@sets("train.bf16")
def bf16(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Without it, Axolotl loads in float16 where that or 8 bits are asked for, else in float32."""
    if value:
        yield Line(key, Kind.SAME, sets={"train.bf16": True if value == "full" else value})
        return
    half = any(config.get(other) for other in ("load_in_8bit", "fp16", "float16"))
    wide = {} if config.get("bfloat16") else {"model.dtype": "float16" if half else "float32"}
    yield Line(key, Kind.SAME, "as Axolotl then loads the model" if wide else "", {"train.bf16": False, **wide})


@sets("train.early_stopping_patience")
def patience(key: str, value: Any, config: Config) -> Iterator[Line]:
    fields = {"train.early_stopping_patience": value, "train.load_best_model_at_end": True}
    yield Line(key, Kind.SAME, "and the best checkpoint is handed over", fields)


@sets("adapter.init_lora_weights")
def loftq(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value == {"loftq_config": {"loftq_bits": 4}}:
        yield Line(key, Kind.OTHER_FIELD, sets={"adapter.init_lora_weights": "loftq"})
    else:
        yield Line(key, Kind.UNSUPPORTED, "adapter.init_lora_weights loftq starts from the error of 4 bits")


@sets("train.router_aux_loss_coef")
def router(key: str, value: Any, config: Config) -> Iterator[Line]:
    for name, each in value.items():
        if name == "output_router_logits" and each and "router_aux_loss_coef" in value:
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, "with router_aux_loss_coef")
        elif name == "output_router_logits" and each:
            text = "the experts' balance counts what the checkpoint's router_aux_loss_coef says: give that as"
            yield Line(f"{key}.{name}", Kind.UNSUPPORTED, f"{text} train.router_aux_loss_coef")
        elif name == "output_router_logits":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, sets={"train.router_aux_loss_coef": 0.0})
        elif name == "router_aux_loss_coef":
            yield Line(f"{key}.{name}", Kind.SAME, sets={"train.router_aux_loss_coef": each})
        else:
            yield Line(f"{key}.{name}", Kind.UNSUPPORTED, "change the config.json of the model")
