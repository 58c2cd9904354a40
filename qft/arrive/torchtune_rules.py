"""What becomes of torchtune's components: models, data sets, optimizers and schedules by the names of functions."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive.line import Config, Kind, Line, sets
from qft.arrive.shared import report_to

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


PLACE = re.compile(r"\$\{([^${}]+)\}")
MOST = 100
"""Places in one text, each of which may stand for a long one."""


def interpolated(value: Any, found: Mapping[str, Any], depth: int = 0) -> Any:
    """With what ${key} and ${oc.env:NAME,default} stand for, as OmegaConf has it; as it is where that is nothing, or is
    built to grow without end."""
    if isinstance(value, list) and depth == 0:
        return [interpolated(each, found, 1) for each in value]
    if not isinstance(value, str) or depth > 9 or value.count("${") > MOST:
        return value
    whole = PLACE.fullmatch(value)
    if whole:
        told = _stands_for(whole[1], found)
        return value if told is None or told == value else interpolated(told, found, depth + 1)
    made = PLACE.sub(lambda match: str(match[0] if (told := _stands_for(match[1], found)) is None else told), value)
    return value if made == value or len(made) > 10_000 else interpolated(made, found, depth + 1)


def _stands_for(place: str, found: Mapping[str, Any]) -> Any:
    if not place.startswith("oc.env:"):
        return found.get(place)
    name, _, default = place.removeprefix("oc.env:").partition(",")
    return os.environ.get(name.strip(), default.strip() or None)


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


LEARNT = ("CrossEntropy", "CEWithChunked")
"""In the names of losses that are the likelihood of the tokens."""


def loss(key: str, value: Any, config: Config) -> Iterator[Line]:
    if any(part in str(value) for part in LEARNT):
        yield Line(key, Kind.DECIDED, "logits of some thousand tokens at a time, the same loss (train.chunked_loss)")
    else:
        text = "qft learns from demonstrations by the likelihood of their tokens: train on the chosen answers"
        yield Line(key, Kind.UNSUPPORTED, text)


@sets("train.report_to")
def logger(key: str, value: Any, config: Config) -> Iterator[Line]:
    name = str(value).rpartition(".")[2]
    where = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}.get(name)
    project = config.get("metric_logger.project")
    shell = f"and WANDB_PROJECT={project} in the environment" if where == "wandb" and project else ""
    if where:
        yield report_to(key, [where], shell)
    elif name == "CometLogger":
        yield Line(key, Kind.UNSUPPORTED, "train.report_to: tensorboard, wandb, mlflow or trackio")
    else:
        yield Line(key, Kind.DECIDED, "the run folder is output_dir, and its report has the curves")


WITHIN = {
    "metric_logger": (Kind.DECIDED, "with metric_logger._component_"),
    "profiler": (Kind.DECIDED, "memory and tokens a second are always reported"),
    "checkpointer": (Kind.DECIDED, "checkpoints are those of the run folder"),
    "tokenizer.prompt_template": (Kind.UNSUPPORTED, "write it as a Jinja file, and name that as data.chat_template"),
}
"""What becomes of any other argument of a component."""


def unknown(key: str, value: Any, config: Config) -> Iterator[Line]:
    """A key that no table has: an argument of a component, a component of another recipe, or one that nobody reads."""
    kind, text = next((told for name, told in WITHIN.items() if key.startswith(f"{name}.")), (None, ""))
    owner = key.partition(".")[0]
    built = config.get(f"{owner}._component_")
    if kind:
        yield Line(key, kind, text)
    elif key.endswith("._component_"):
        yield Line(key, Kind.UNSUPPORTED, "the LoRA recipes build no such part: it is of another recipe of torchtune's")
    elif built:
        yield Line(key, Kind.UNSUPPORTED, f"an argument of {built}, which qft does not build")
    else:
        yield Line(key, Kind.NO_EFFECT, "the LoRA recipes of torchtune read no such key, and say nothing")


@sets("train.save_strategy", "train.save_steps")
def saved(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, sets={"train.save_strategy": "steps", "train.save_steps": value})


def resumed(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value is True:
        text = "a run of torchtune's is not gone on with: merge its adapter into the model, and name that as model.path"
        yield Line(key, Kind.UNSUPPORTED, text)
    else:
        yield Line(key, Kind.SAME, "off: qft train --resume goes on where a run of its own ended")


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
