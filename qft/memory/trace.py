"""One training step on tensors without contents: the bytes that it holds at its worst moments, by what they are.

The model's own code runs (transformers', peft's), so an architecture needs no formula of its own. Blocks that are alike
need not all be traced: each part's peak grows by as much from block to block, so two short models tell of a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from qft.checkpoint.skeleton import find_blocks
from qft.kernels import expect, keep
from qft.kernels.buffers import SCRATCH
from qft.memory.asked import answer, distilled, innermost, loss_of, masked
from qft.memory.checkpointing import enable_checkpointing
from qft.memory.chunked_loss import replace_forward, rows_at_once
from qft.memory.fused_loss import FusedLoss, allows_chunks, replace_with, tail_of
from qft.memory.known import Known
from qft.memory.ledger import Ledger
from qft.memory.offload import SLOTS
from qft.memory.on_gpu import OnGpu
from qft.memory.repeated import Pattern, pattern
from qft.memory.softmax import gradient_in_place
from qft.memory.stand_in import NoLayerDropped, fill, gradient_on_gpu, hold, peft_sees_autocast, set_attention
from qft.memory.stash import Stash, stash_inputs
from qft.memory.unmasked import one_row_each
from qft.memory.work import IMAGES, MIDDLE, UPDATE, Batch, Ends, Step, Traced, Work
from qft.quant.beside import compute_beside
from qft.quant.hold import Qat
from qft.quant.rounded import round_as

PROBE = "probe"
"""Part of the work that is none of the worst: a look at few tokens before it begins."""
BESIDE = (PROBE, UPDATE, "evaluation", "answers")
"""Parts that are no forward or backward pass of a step."""
SMALL, FEW_TOKENS = 2**28, 2**12
"""Weights times tokens, and tokens: of no more, to compute with real tensors takes less than to follow their shapes."""


@dataclass(frozen=True)
class Few:
    """A model without contents of as few blocks as tell of all; it is copied, and never changed."""

    model: PreTrainedModel
    place: str
    """Of its blocks."""
    found: Pattern
    weights: int
    """Of all."""

    def of(self, count: int) -> tuple[PreTrainedModel, nn.ModuleList]:
        """A copy of so many blocks, and these."""
        model = deepcopy(self.model)
        blocks: Any = model.get_submodule(self.place)
        del blocks[count:]
        return model, blocks


def few_blocks(model: PreTrainedModel, layers: int) -> Few:
    """Of an unquantized model on the meta device, which is taken apart."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    place, blocks = find_blocks(model, layers)
    found = pattern(blocks)
    del blocks[found.kept + found.period :]
    return Few(model, place, found, weights)


def trace(few: Few, work: Work, step: Step) -> Ends:
    """What tells of a step, whatever its optimizer is."""
    if _is_small(few, work, step):
        with suppress(Exception):  # of numbers that mean nothing
            return _trace(few, work, step, nullcontext)
    return _trace(few, work, step, partial(FakeTensorMode, allow_non_fake_inputs=True))


def _is_small(few: Few, work: Work, step: Step) -> bool:
    """Whether it is trained on a CPU, and computed with as soon as traced."""
    tokens = max(batch.rows * batch.tokens for batch in (step.batch, work.held_out, work.answered) if batch)
    return not work.on_gpu and tokens <= FEW_TOKENS and tokens * few.weights <= SMALL


def _trace(few: Few, work: Work, step: Step, tensors: Callable[[], AbstractContextManager[Any]]) -> Ends:
    found = few.found
    counts = (found.kept, found.kept + found.period) if found.times else (found.period,)
    each = [traced(*few.of(count), found, work, step, tensors()) for count in counts]
    return Ends(each[0], each[-1], found.times)


def traced(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    found: Pattern,
    work: Work,
    step: Step,
    tensors: AbstractContextManager[Any],
) -> Traced:
    """Of a model on the meta device as it stands, computed with `tensors`: real ones, or such without contents."""
    model.config.use_cache = False
    asked = model.config._attn_implementation
    set_attention(model, asked, padded=_has_mask(step.batch, work.masks or masked(model)))
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    weights |= {shape[1:] for shape in weights if len(shape) == 3}  # of one expert
    vocabulary = model.get_output_embeddings().weight.shape[0]

    def label_of(tensor: torch.Tensor, label: str) -> str:
        if label == "activations" and tensor.dim() > 1 and tensor.shape[-1] == vocabulary:
            return "logits"
        copied = label == "activations" and tuple(tensor.shape) in weights
        return "dequantized_weights" if copied else label

    ledger = Ledger(label_of)
    gpu = OnGpu(work.mixed, ledger.count) if work.on_gpu else None
    adapted = _adapted(model, work, gpu, checkpointed=step.kept == "inputs")
    with SCRATCH.apart(), ExitStack() as entered:
        entered.enter_context(torch.random.fork_rng(devices=[]))
        entered.enter_context(tensors)
        if any(batch and batch.seen for batch in (step.batch, work.held_out, work.answered)):
            entered.enter_context(Known())  # type: ignore[no-untyped-call]
        entered.enter_context(ledger)
        entered.enter_context(one_row_each())
        entered.enter_context(NoLayerDropped())
        if gpu:
            entered.enter_context(gpu)
            entered.enter_context(peft_sees_autocast(work.mixed is not None))
        _watch(blocks, found, ledger)
        _run(adapted, blocks, ledger, work, step, asked)
    of_step = (work for part, work in ledger.work.items() if part.removesuffix(IMAGES) not in BESIDE)
    peaks = {part: peak for part, peak in ledger.peaks().items() if part not in ("", PROBE)}
    return Traced(peaks, sum(of_step), tuple(p.shape for p in adapted.parameters() if p.requires_grad))


def _has_mask(batch: Batch, masks: bool) -> bool:
    """Whether attention is told of padding, which with images a model finds out itself."""
    return batch.seen is not None or (batch.padded and masks)


def _adapted(model: PreTrainedModel, work: Work, gpu: OnGpu | None, *, checkpointed: bool) -> nn.Module:
    """As it is trained: quantized, checkpointed, with adapters; on the meta device."""
    hold(model, work.scheme)
    model.requires_grad_(work.lora is None)
    again: dict[str, Any] = {"preserve_rng_state": False} | ({"context_fn": gpu.entered_again} if gpu else {})
    if checkpointed:
        enable_checkpointing(model, **again)
        if work.stashes:
            stash_inputs(model, torch.device("cpu"))
        model.enable_input_require_grads()
    if work.neftune:
        noisy = model.get_input_embeddings()
        noisy.register_forward_hook(lambda _, __, out: out + torch.zeros_like(out).uniform_())
    if work.logit_bytes:
        _divide_loss(model, work.logit_bytes, again, on_gpu=work.on_gpu)
    adapted: nn.Module = model
    roundings = work.scheme.roundings(model) if isinstance(work.scheme, Qat) else {}
    if work.lora is not None:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**work.lora | {"init_lora_weights": False}))
        compute_beside(adapted)
    if isinstance(work.scheme, Qat):
        traced = work.scheme.target.traced
        round_as(adapted, work.scheme, dict.fromkeys(roundings, traced) if traced else roundings)
    return adapted.train()


def _divide_loss(model: PreTrainedModel, size: int, again: dict[str, Any], *, on_gpu: bool) -> None:
    """As a training does, if its model allows it."""
    if tail := tail_of(model):
        fused = FusedLoss(model, size, tail, gradient_on_gpu if on_gpu else gradient_in_place)
        fused.always = False  # if it is, that takes less
        replace_with(fused)
    elif allows_chunks(model):
        replace_forward(model, rows_at_once(model, size), **again)


def _watch(blocks: nn.ModuleList, found: Pattern, ledger: Ledger) -> None:
    """Tell the ledger which part of the work is under way, at the borders of the first run of each block."""

    def border(number: int) -> Callable[..., None]:
        late, early = number >= len(blocks) - found.period, number < found.prefix + found.period
        part = "last blocks" if late else "first blocks" if early else MIDDLE

        def pass_on(_: Any) -> None:
            ledger.part = part

        def note(_: nn.Module, __: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple | list) else out
            if ledger.part == "forward" and hidden.requires_grad:
                hidden.register_hook(pass_on)

        return note

    for number, block in enumerate(blocks):
        block.register_forward_hook(border(number))


def _fill(model: nn.Module, blocks: nn.ModuleList, ledger: Ledger, work: Work) -> torch.Tensor:
    """Give the model its weights; of those that memory.offload keeps elsewhere, only the places for two blocks, which
    are returned."""
    number_of = {module: number for number, block in enumerate(blocks) for module in block.modules()}
    waiting, base = [0] * len(blocks), innermost(model)
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


def _run(model: nn.Module, blocks: nn.ModuleList, ledger: Ledger, work: Work, step: Step, attention_asked: str) -> None:
    """The second step of a training, when the optimizer has its state, and an evaluation."""
    slots = _fill(model, blocks, ledger, work)
    ledger.part = PROBE
    applied = expect(model, blocks, work.kernels, work.mixed)
    keep(applied.keeps, [step.kept] * len(blocks), Stash(torch.device("cpu")) if work.stashes else None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger.label = "gradients"
    if step.accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    ledger.label, ledger.part = "activations", "forward"
    with disable_input_dtype_casting(model, active=work.mixed is not None):
        with _seeing(blocks[0], ledger, step.batch):
            loss = distilled(model, step.batch, work) if work.distill else loss_of(model, step.batch, work)
        ledger.part = "head"
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        for parameter in trained:
            if parameter.grad is not None:
                ledger.relabel(parameter.grad, "gradients")
        ledger.part = UPDATE
        torch.empty(0)  # before anything is freed
        model.zero_grad(set_to_none=True)
        if work.held_out:
            ledger.part = "evaluation"
            set_attention(innermost(model), attention_asked, padded=_has_mask(work.held_out, masks=True))
            with torch.no_grad(), _seeing(blocks[0], ledger, work.held_out):
                loss_of(model.eval(), work.held_out, work)
        if work.answered:
            ledger.part = "answers"
            with _seeing(blocks[0], ledger, work.answered):
                answer(model.eval(), work.answered, work)
    del slots


@contextmanager
def _seeing(block: nn.Module, ledger: Ledger, batch: Batch) -> Iterator[None]:
    """What comes before the first block is a part of its own where there are images: it grows with no block."""
    if batch.seen is None:
        yield
        return
    part, ledger.part = ledger.part, ledger.part + IMAGES

    def go_on(*_: Any) -> None:
        if ledger.part.endswith(IMAGES):
            ledger.part = part

    handle = block.register_forward_pre_hook(go_on)
    try:
        yield
    finally:
        handle.remove()
