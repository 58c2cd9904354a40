"""The plan as a rich table."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from qft.report.terminal import si, table

__all__ = ["render_plan"]


def render_plan(facts: dict[str, Any]) -> Group:
    """What `qft check` shows; `facts` are those of Plan.facts()."""
    return Group(_model(facts), _training(facts), _data(facts))


def _model(facts: dict[str, Any]) -> Table:
    model, quantization, adapter = facts["model"], facts["quantization"], facts["adapter"]
    rows = table("Model")
    commit = f" at {model['commit']}" if model["commit"] else ""
    rows.add_row("path", f"{model['path']}{commit}")
    rows.add_row("base", f"{model['architecture']}, {si(model['parameters'])} parameters, {model['layers']} blocks")
    details = ", ".join(f"{name} {value}" for name, value in quantization.items() if name != "scheme")
    rows.add_row(
        "held as", f"{quantization['scheme']}{f' ({details})' if details else ''}; the rest in {model['dtype']}"
    )
    share = model["trainable_parameters"] / model["parameters"]
    kind = f"LoRA r={adapter['r']} on {_names(adapter['target_modules'])}" if adapter else "all weights"
    rows.add_row("trained", f"{kind}: {si(model['trainable_parameters'])} parameters ({share:.2%})")
    rows.add_row("on", facts["device"]["name"])
    return rows


def _training(facts: dict[str, Any]) -> Table:
    training, data = facts["training"], facts["data"]
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    precision = "bf16" if training["bf16"] else "fp16" if training["fp16"] else "off"
    checkpointing = training.get("activation_checkpointing", training.get("gradient_checkpointing"))
    rows = table("Training")
    rows.add_row("steps", f"{facts['steps']} of {batch} rows ({training['gradient_accumulation_steps']} accumulated)")
    rows.add_row("rows", f"{data['train_rows']:,} to train on, {data['eval_rows']:,} held out")
    rows.add_row(
        "optimizer", f"{training['optim']}, {training['lr_scheduler_type']} from {training['learning_rate']:g}"
    )
    rows.add_row("mixed precision", f"{precision}; gradient checkpointing {'on' if checkpointing else 'off'}")
    return rows


def _data(facts: dict[str, Any]) -> Table:
    rows = table("Data", "source", "format", "rows", "tokens", "learnt", "longest", "skipped", "cut")
    for source in facts["data"]["sources"]:
        counts = (source[name] for name in ("rows", "tokens", "supervised_tokens", "longest", "skipped", "truncated"))
        rows.add_row(f"{source['part']}: {source['path']}", source["format"], *(f"{count:,}" for count in counts))
    return rows


def _names(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)
