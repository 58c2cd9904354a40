"""The plan as a rich table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from qft.views.terminal.table import Facts, Rows, Whole, bullets, spaced
from qft.views.words import si

__all__ = ["render_plan"]


def render_plan(facts: dict[str, Any]) -> Group:
    """What `qft check` shows; `facts` are those of Plan.facts()."""
    parts: list[RenderableType] = [_model(facts), _training(facts), _data(facts)] if "training" in facts else []
    if "calibration" in facts:
        parts.append(_calibration(facts["calibration"]))
    return spaced(*parts)


def _calibration(facts: dict[str, Any]) -> Group:
    """How a calibration holds the layers, and on what it looks."""
    model, schemes, audit = facts["model"], facts["schemes"], facts["data"]["audit"]
    rows = Facts("Calibration")
    rows.add("model", Whole(f"{model['path']}, {si(model['parameters'])} parameters, {model['layers']} blocks"))
    if held := [scheme for scheme in schemes.values() if scheme]:
        group = f", groups of {held[0]['group_size']}" if held[0]["group_size"] > 0 else ""
        kind = f"{held[0]['data_type']}, {held[0]['bits']} bits{group}; activations {held[0]['activations']}"
        maker = f"{facts['algorithm']} of {facts['engine']}" if facts["algorithm"] else facts["engine"]
        rows.add("weights", f"{kind}, by {maker}")
        rows.add("layers", f"{len(held)} quantized, {len(schemes) - len(held)} left in {model['dtype']}")
    else:
        rows.add("weights", "as quant.plugin holds them")
    windows = f"{audit['windows']} windows of {audit['window_tokens']} tokens" if audit else "none needed"
    rows.add("looks at", windows)
    rows.add("judged by", f"{facts['data']['verify_rows']} held-out rows")
    rows.add("on", facts["device"]["name"])
    return Group(rows, *bullets(facts["data"]["warnings"], "yellow"))


def _model(facts: dict[str, Any]) -> Facts:
    model, quantization, adapter = facts["model"], facts["quantization"], facts["adapter"]
    rows = Facts("Model")
    commit = f" at {model['commit']}" if model["commit"] else ""
    rows.add("path", Whole(f"{model['path']}{commit}"))
    rows.add("base", f"{model['architecture']}, {si(model['parameters'])} parameters, {model['layers']} blocks")
    rows.add("held as", f"{_held(quantization)}; the rest in {model['dtype']}")
    if facts["skip_modules"] == "auto":
        rows.add("", "layers to leave in 16 bits are measured and chosen by `qft train`")
    if plugin := quantization["plugin"]:
        rows.add("quantizer", Whole(f"{plugin['path']}, SHA-256 {plugin['sha256'][:12]}…"))
    share = model["trainable_parameters"] / model["parameters"]
    kind = f"LoRA r={adapter['r']} on {_names(adapter['target_modules'])}" if adapter else "all weights"
    rows.add("trained", f"{kind}: {si(model['trainable_parameters'])} parameters ({share:.2%})")
    rows.add("on", facts["device"]["name"])
    return rows


def _training(facts: dict[str, Any]) -> Facts:
    training, data = facts["training"], facts["data"]
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    precision = "bf16" if training["bf16"] else "fp16" if training["fp16"] else "off"
    checkpointing = training.get("activation_checkpointing", training.get("gradient_checkpointing"))
    rows = Facts("Training")
    rows.add("steps", f"{facts['steps']} of {batch} rows ({training['gradient_accumulation_steps']} accumulated)")
    rows.add("rows", f"{data['train_rows']:,} to train on, {data['eval_rows']:,} held out")
    rows.add("optimizer", f"{training['optim']}, {training['lr_scheduler_type']} from {training['learning_rate']:g}")
    rows.add("mixed precision", f"{precision}; gradient checkpointing {'on' if checkpointing else 'off'}")
    return rows


def _data(facts: dict[str, Any]) -> Rows:
    rows = Rows("Data", "source", "format", "rows", "tokens", "learnt", "longest", "skipped", "cut")
    for source in facts["data"]["sources"]:
        counts = (source[name] for name in ("rows", "tokens", "supervised_tokens", "longest", "skipped", "truncated"))
        name = f"{source['part']}: {Path(source['path']).name}"
        rows.add(name, source["format"], *(f"{count:,}" for count in counts))
    return rows


def _held(quantization: dict[str, Any]) -> str:
    """The scheme with its data type: `4bit nf4, double quantization, computed in bfloat16`."""
    parts = [quantization["scheme"]]
    if data_type := quantization.get("bnb_4bit_quant_type"):
        parts[0] += f" {data_type}"
        if quantization.get("bnb_4bit_use_double_quant"):
            parts.append("double quantization")
        parts.append(f"computed in {quantization.get('bnb_4bit_compute_dtype')}")
    if skipped := quantization.get("llm_int8_skip_modules") or quantization.get("modules_to_not_convert"):
        parts.append(f"not {', '.join(skipped)}")
    return ", ".join(parts)


def _names(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)
