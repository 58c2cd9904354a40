"""One training step on tensors without contents: the bytes that it holds at its worst moments, by what they are.

The model's own code runs (transformers', peft's), so an architecture needs no formula of its own. Blocks that are alike
need not all be traced: each part's peak grows by as much from block to block, so two short models tell of a long one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from qft.checkpoint.skeleton import find_blocks
from qft.memory.checkpointing import enable_checkpointing
from qft.memory.chunked_loss import has_parts, replace_forward, rows_at_once
from qft.memory.ledger import Ledger, Peak
from qft.memory.offload import SLOTS
from qft.memory.optimizers import STATES, step_bytes
from qft.memory.repeated import Pattern, pattern
from qft.memory.stand_in import OnGpu, fill, hold, peft_sees_autocast, set_attention
from qft.quant.beside import compute_beside
from qft.quant.hold import Scheme

MIDDLE = "other blocks"


@dataclass(frozen=True)
class Batch:
    """What one forward pass is given."""

    rows: int
    tokens: int
    """Of the longest row, padding included."""
    padded: bool
    """Whether any row is shorter."""


@dataclass(frozen=True)
class Step:
    """How an optimizer step is made."""

    batch: Batch
    """Of a micro-batch."""
    checkpointed: bool
    """Whether blocks keep nothing but their inputs, and are computed again in the backward pass."""
    accumulates: bool
    """Whether it has several micro-batches."""


@dataclass(frozen=True)
class Work:
    """What the memory of a training depends on, beside its model and its steps."""

    scheme: Scheme
    lora: dict[str, Any] | None
    """Arguments of peft.LoraConfig; None: all weights are trained."""
    optim: str
    """By its name in the recipe, as the two below are what train says."""
    label_smoothing_factor: float
    neftune: bool
    mixed: torch.dtype | None
    """Of autocast; None: there is none."""
    on_gpu: bool
    logit_bytes: int | None
    """What logits may take at once where the loss is computed from few of them; None: it is computed from all."""
    offloads: bool
    """Whether the frozen weights of the blocks wait elsewhere."""
    held_out: Batch | None
    """What is evaluated."""
    answered: Batch | None = None
    """What is answered, the longest answers included."""


def trace(build: Callable[[], PreTrainedModel], layers: int, work: Work, step: Step) -> dict[str, Peak]:
    """Peaks by part of the work: forward, head, the blocks of the backward pass, update, evaluation.

    `build` makes the unquantized model on the meta device, anew each time."""
    model = build()
    blocks = find_blocks(model, layers)[1]
    found = pattern(blocks)
    del blocks[found.kept + found.period :]
    longer = peaks(model, blocks, found, work, step)
    if not found.times:
        return longer
    model = build()
    blocks = find_blocks(model, layers)[1]
    del blocks[found.kept :]
    shorter = peaks(model, blocks, found, work, step)
    # Between the first blocks and the last, peaks rise or fall from one to the next: none is the highest.
    ends = (part for part in longer if part != MIDDLE)
    return {part: shorter[part].extrapolated(longer[part], found.times) for part in ends}


def peaks(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    found: Pattern,
    work: Work,
    step: Step,
    tensors: AbstractContextManager[Any] | None = None,
) -> dict[str, Peak]:
    """Of a model on the meta device as it stands, computed with `tensors` that are without contents if not said
    otherwise."""
    model.config.use_cache = False
    set_attention(model, padded=step.batch.padded)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    weights |= {shape[1:] for shape in weights if len(shape) == 3}  # of one expert
    vocabulary = model.get_output_embeddings().weight.shape[0]

    def label_of(tensor: torch.Tensor, label: str) -> str:
        if label == "activations" and tensor.dim() > 1 and tensor.shape[-1] == vocabulary:
            return "logits"
        copied = label == "activations" and tuple(tensor.shape) in weights
        return "dequantized_weights" if copied else label

    gpu = OnGpu(work.mixed) if work.on_gpu else None
    adapted = _adapted(model, work, gpu, checkpointed=step.checkpointed)
    ledger = Ledger(label_of)
    with ExitStack() as entered:
        entered.enter_context(tensors or FakeTensorMode(allow_non_fake_inputs=True))
        entered.enter_context(ledger)
        if gpu:
            entered.enter_context(gpu)
            entered.enter_context(peft_sees_autocast(work.mixed is not None))
        _watch(blocks, found, ledger)
        _run(adapted, blocks, ledger, work, step)
    return ledger.peaks()


def _adapted(model: PreTrainedModel, work: Work, gpu: OnGpu | None, *, checkpointed: bool) -> nn.Module:
    """As it is trained: quantized, checkpointed, with adapters; on the meta device."""
    hold(model, work.scheme)
    model.requires_grad_(work.lora is None)
    again: dict[str, Any] = {"preserve_rng_state": False} | ({"context_fn": gpu.entered_again} if gpu else {})
    if checkpointed:
        enable_checkpointing(model, **again)
        model.enable_input_require_grads()
    if work.neftune:
        noisy = model.get_input_embeddings()
        noisy.register_forward_hook(lambda _, __, out: out + torch.zeros_like(out).uniform_())
    if work.logit_bytes and has_parts(model):
        replace_forward(model, rows_at_once(model, work.logit_bytes), **again)
    adapted: nn.Module = model
    if work.lora is not None:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**work.lora | {"init_lora_weights": False}))
        compute_beside(adapted)
    return adapted.train()


def _watch(blocks: nn.ModuleList, found: Pattern, ledger: Ledger) -> None:
    """Tell the ledger which part of the work is under way, at the borders of the first run of each block."""

    def border(number: int) -> Callable[..., None]:
        late, early = number >= len(blocks) - found.period, number < found.prefix + found.period
        part = "last blocks" if late else "first blocks" if early else MIDDLE

        def pass_on(_: Any) -> None:
            ledger.part = part

        def note(_: nn.Module, __: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if ledger.part == "forward" and hidden.requires_grad:
                hidden.register_hook(pass_on)

        return note

    for number, block in enumerate(blocks):
        block.register_forward_hook(border(number))


def _fill(model: nn.Module, blocks: nn.ModuleList, ledger: Ledger, work: Work) -> torch.Tensor:
    """Give the model its weights; of those that memory.offload keeps elsewhere, only the places for two blocks, which
    are returned."""
    number_of = {module: number for number, block in enumerate(blocks) for module in block.modules()}
    waiting, base = [0] * len(blocks), _innermost(model)
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = table.weight is getattr(head, "base_layer", head).weight

    def note(tensor: torch.Tensor, module: nn.Module, trained: bool) -> None:
        ledger.relabel(tensor, "trainable_weights" if trained else "base_weights")
        if not work.offloads or trained or (tensor.dim() < 2 and tensor.dtype != torch.uint8):
            return
        if module in number_of:
            waiting[number_of[module]] += ledger.forget(tensor)
        elif module is table and not tied:
            ledger.forget(tensor)

    fill(model, work.scheme, note)
    ledger.label = "base_weights"
    return torch.empty(SLOTS * max(waiting), dtype=torch.uint8)


def _run(model: nn.Module, blocks: nn.ModuleList, ledger: Ledger, work: Work, step: Step) -> None:
    """The second step of a training, when the optimizer has its state, and an evaluation."""
    slots = _fill(model, blocks, ledger, work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger.label = "optimizer_state"
    state = [torch.empty(n, dtype=torch.uint8) for p in trained for n in STATES[work.optim](p.shape)]
    ledger.label = "gradients"
    if step.accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    ledger.label, ledger.part = "activations", "forward"
    with disable_input_dtype_casting(model, active=work.mixed is not None):
        loss = _loss(model, step.batch, work)
        ledger.part = "head"
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        for parameter in trained:
            if parameter.grad is not None:
                ledger.relabel(parameter.grad, "gradients")
        ledger.part = "update"
        taken = torch.empty(step_bytes(work.optim, trained, on_gpu=work.on_gpu), dtype=torch.uint8)
        del taken
        model.zero_grad(set_to_none=True)
        if work.held_out:
            ledger.part = "evaluation"
            with torch.no_grad():
                _loss(model.eval(), work.held_out, work)
        if work.answered:
            ledger.part = "answers"
            _answer(model.eval(), work.answered, work)
    del state, slots


def _answer(model: nn.Module, batch: Batch, work: Work) -> None:
    """All tokens at once, where they come one by one: their keys and values are kept, and logits of the last alone."""
    ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
    mask = torch.cat([ids[:, :1], torch.ones_like(ids[:, 1:])], dim=1)
    keeps = "logits_to_keep" in inspect.signature(_innermost(model).forward).parameters
    with torch.no_grad(), _autocast(work.mixed):
        model(input_ids=ids, attention_mask=mask, use_cache=True, **{"logits_to_keep": 1} if keeps else {})


def _innermost(model: Any) -> Any:
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return base


def _loss(model: nn.Module, batch: Batch, work: Work) -> torch.Tensor:
    """As the Trainer computes it: under autocast, what the model returns in float32."""
    shape = (batch.rows, batch.tokens)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    smoothing = work.label_smoothing_factor if model.training else 0.0
    mask = torch.cat([torch.ones_like(ids[:, 1:]), ids[:, :1]], dim=1) if batch.padded else None
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if not smoothing:
        inputs |= {"labels": labels, "num_items_in_batch": torch.ones((), dtype=torch.int64)}
    with _autocast(work.mixed):
        out = model(**inputs)
    if work.mixed is not None and "logits" in out:
        out["logits"] = out["logits"].float()
    if smoothing:
        smoothed: torch.Tensor = LabelSmoother(smoothing)(out, labels, shift_labels=True)
        return smoothed
    loss: torch.Tensor = out["loss"]
    return loss


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
