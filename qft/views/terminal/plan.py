"""The plan as a rich table."""

from collections.abc import Sequence

from rich.console import Group, RenderableType

from qft.documents.plan import (
    CalibrationCheck,
    CalibrationPlanDocument,
    PlanDocument,
    PlannedExperts,
    PlannedStage,
)
from qft.views.terminal.gpus import render_gpus
from qft.views.terminal.memory import render_memory
from qft.views.terminal.rows import Shown, render_data
from qft.views.terminal.table import Facts, Rows, Whole, bullets, spaced
from qft.views.words import count, share_held, si, size


def render_plan(plan: PlanDocument | CalibrationCheck) -> Group:
    """What `qft check` shows."""
    parts: list[RenderableType] = [_model(plan), _training(plan), render_data(plan.data)] if plan.kind == "plan" else []
    if plan.kind == "plan" and plan.stages:
        parts.append(_stages(plan.stages))
    if plan.kind == "plan" and plan.memory:
        parts.append(render_memory(plan.memory, " of the stage that takes most" if plan.stages else ""))
    if plan.kind == "plan" and plan.gpus:
        parts.append(render_gpus(plan.gpus))
    if plan.calibration:
        parts.append(_calibration(plan.calibration))
    if plan.kind == "plan" and plan.exports:
        parts.append(_exports(plan.exports))
    return spaced(*parts, *map(Shown, plan.shown))


def _calibration(plan: CalibrationPlanDocument) -> Group:
    """How a calibration holds the layers, and on what it looks."""
    model, audit = plan.model, plan.data.audit
    rows = Facts("Calibration")
    rows.add("model", Whole(f"{model.path}, {si(model.parameters)} parameters, {model.layers} blocks"))
    if quantized := [scheme for scheme in plan.schemes.values() if scheme]:
        scheme = quantized[0]
        group = f", groups of {scheme.group_size}" if scheme.group_size > 0 else ""
        kind = f"{scheme.data_type}, {scheme.bits} bits{group}; activations {scheme.activations}"
        maker = f"{plan.algorithm} of {plan.engine}" if plan.algorithm else plan.engine
        rows.add("weights", f"{kind}, by {maker}")
        left = len(plan.schemes) - len(quantized)
        rows.add("layers", f"{len(quantized)} quantized, {left} left in {model.dtype}")
        if held := share_held(plan.quantized_share):
            rows.add("", f"{held} quantized")
    else:
        rows.add("weights", "as quant.plugin holds them")
    _add_matches(rows, plan.matched)
    windows = f"{audit.windows} windows of {audit.window_tokens} tokens" if audit else "none needed"
    rows.add("looks at", windows)
    rows.add("judged by", f"{plan.data.verify_rows} held-out rows")
    rows.add("on", plan.device.name)
    return Group(rows, *bullets(plan.data.warnings, "yellow"))


def _model(plan: PlanDocument) -> Facts:
    model, adapter = plan.model, plan.adapter
    rows = Facts("Model")
    commit = f" at {model.commit}" if model.commit else ""
    rows.add("path", Whole(f"{model.path}{commit}"))
    rows.add("base", f"{model.architecture}, {si(model.parameters)} parameters, {model.layers} blocks")
    rows.add("held as", f"{plan.quantization.described}; the rest in {model.dtype}")
    if plan.quantization.scheme != "none" and (held := share_held(plan.quantization.quantized_share)):
        rows.add("", held)
    if model.beside:
        rows.add("beside text", f"{', '.join(model.beside)}: as they are, in {model.dtype}, and handed over to the bit")
    if plan.offload != "none":
        place = {"cpu": "in the host's memory", "disk": "on disk"}[plan.offload]
        rows.add("", f"its blocks wait {place}, and two at a time are on the device")
    if plan.skip_modules == "auto":
        rows.add("", "layers to leave in 16 bits are measured and chosen by `qft train`")
    if plugin := plan.quantization.plugin:
        rows.add("quantizer", Whole(f"{plugin.path}, SHA-256 {plugin.sha256[:12]}…"))
    if model.added_tokens:
        counts = (f"{token} ({plan.data.added_tokens.get(token, 0)} times)" for token in model.added_tokens)
        rows.add("new tokens", f"{', '.join(counts)} in the training rows")
    share = model.trainable_parameters / model.parameters
    kind = f"LoRA r={adapter.r} on {_names(adapter.target_modules)}" if adapter else "all weights"
    rows.add("trained", f"{kind}: {si(model.trainable_parameters)} parameters ({share:.2%})")
    if plan.experts:
        _add_experts(rows, plan.experts)
    _add_matches(rows, plan.matched)
    rows.add("on", plan.device.name)
    if plan.gpu_allocator:
        rows.add("", f"its allocator: {plan.gpu_allocator}")
    return rows


def _add_experts(rows: Facts, experts: PlannedExperts) -> None:
    """What of a mixture is trained."""
    rows.add("experts", f"{experts.experts} a layer, {si(experts.weights)} weights ({experts.share:.1%})")
    adapters = f"{experts.adapted} of their parameters adapted: {si(experts.trainable_parameters)} parameters"
    rows.add("", f"{adapters if experts.adapted else 'not adapted'} (target_experts {experts.decided})")
    rows.add("router", experts.router)
    if lost := experts.unadapted:
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in lost))
        rows.add("", f"{len(lost)} linear layers without adapters, as peft takes {names} for experts")


def _add_matches(rows: Facts, matched: dict[str, dict[str, int]]) -> None:
    """How many modules each name in the recipe is to the model."""
    for field, counts in matched.items():
        rows.add(field.partition(".")[2], ", ".join(f"{entry}: {number}" for entry, number in counts.items()))


def _training(plan: PlanDocument) -> Facts:
    training, data = plan.training, plan.data
    gpus = plan.gpus.gpus * plan.gpus.nodes if plan.gpus else 1
    passes = training.gradient_accumulation_steps * gpus
    batch = training.per_device_train_batch_size * passes
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "off"
    rows = Facts("Training")
    rows.add("steps", f"{plan.steps} of {batch} rows ({passes} accumulated{f' by {gpus} GPUs' if gpus > 1 else ''})")
    longest = f"; of {data.max_length:,} tokens at most" if data.max_length else ""
    if data.streamed_lines is not None:
        looked_at = f"the first {count(data.train_rows, 'example')} looked at"
        rows.add("streamed", f"{count(data.streamed_lines, 'line')}, read while they are learnt; {looked_at}")
    rows.add("rows", f"{data.train_rows:,} to train on, {data.eval_rows:,} held out{longest}")
    if data.packed_rows is not None:
        rows.add("", f"packed: {count(data.train_rows, 'example')} in {data.packed_rows:,} rows")
    if data.chat_template:
        known = {"model": "the model's own", "none": "none: answers follow their questions, then the end token"}
        rows.add("chat template", known.get(data.chat_template) or Whole(data.chat_template))
    rows.add("optimizer", f"{training.optim}, {training.lr_scheduler_type} from {training.learning_rate:g}")
    rows.add("mixed precision", f"{precision}; gradient checkpointing {'on' if training.checkpointing else 'off'}")
    if plan.checkpoints == "host":
        rows.add("", "inputs of checkpointed blocks wait in the host's memory")
    if plan.device.kind != "cpu":
        _add_kernels(rows, plan.kernels)
    return rows


def _stages(stages: Sequence[PlannedStage]) -> Rows:
    """Trainings that follow one another; what does not fit is said where memory is told of."""
    table = Rows("Stages", "", "steps", "held as", "optimizer", "learning rate", "memory")
    for number, stage in enumerate(stages, 1):
        training, memory = stage.training, stage.memory
        rate = f"{training.lr_scheduler_type} from {training.learning_rate:g}"
        peak = memory.predicted_peak_bytes if memory else None
        table.add(
            str(number),
            f"{stage.first_step} to {stage.last_step}",
            stage.quantization.described,
            f"{training.optim}{', anew' if stage.reset_optimizer else ''}",
            f"{rate}{', anew' if stage.reset_lr_scheduler else ''}",
            "unknown" if peak is None else size(peak) + ("" if memory and memory.fits else " does NOT fit"),
        )
    return table


def _add_kernels(rows: Facts, kernels: dict[str, str | None]) -> None:
    """Each reason once."""
    for why in dict.fromkeys([None, *kernels.values()]):
        names = ", ".join(name for name, own in kernels.items() if own == why)
        if names:
            rows.add("not fused" if why else "fused", f"{names}: {why}" if why else names)


def _exports(exports: dict[str, str | None]) -> Facts:
    """What the training could be handed over as."""
    rows = Facts("Exports")
    add_reasons(rows, exports)
    return rows


def add_reasons(rows: Facts, exports: dict[str, str | None]) -> None:
    """What is possible, and of the others each reason why not, once."""
    for why in dict.fromkeys([None, *exports.values()]):
        names = ", ".join(name for name, own in exports.items() if own == why)
        if names:
            rows.add("impossible" if why else "possible", f"{names}: {why}" if why else names)


def _names(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)
