"""The loss of a causal language model whose output head is run once a step, on learnt tokens alone.

Of each chunk of rows, the head's outputs become their own gradient (softmax.py), and that of hidden states and of what
is trained in the head is taken at once: nothing is computed again, and the backward pass only multiplies.

The head stays the model's own module, whatever it is (biased, tied, with adapters, trained); what stands behind it is
found by trying.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from qft.data.template import IGNORED
from qft.kernels.in_place import in_place_of
from qft.memory.chunked_loss import Chunked, decoded, decoder_of, rows_at_once, vocabulary
from qft.memory.softmax import Gradient, Tail, gradient_in_place

WHOLE_TILES = 128
"""What a chunk's rows are a multiple of, if there are so many."""
COUNTS = "learnt_tokens"
"""Argument of the model's forward pass: of each row, how many labels behind the first are no -100, as ints. Whoever
leaves it out has the device waited for."""

WEIGHTS = "loss_weights"
"""Argument of the model's forward pass: what each label counts, float32 [rows, tokens]; None: 1."""


def fuse_loss(model: PreTrainedModel, size: int, *, always: bool = False) -> bool:
    """Have the model's loss, and its gradient, computed from as many logits at a time as take `size` bytes in float32,
    of batches that have more or `always`. Returns whether it is: a model that does anything else between decoder and
    loss keeps its own."""
    tail = tail_of(model)
    fused = tail and FusedLoss(model, size, tail)
    if not fused or not _agrees(model, fused):
        return False
    fused.always = always
    replace_with(fused)
    return True


def replace_with(fused: FusedLoss) -> None:
    """As fuse_loss, without trying."""
    fused.model.forward = functools.wraps(fused.whole)(fused)


def tail_of(model: PreTrainedModel) -> Tail | None:
    """What the model does between its head and the cross-entropy of the next tokens; None: something else. Needs no
    weights: decoder and head are stood in for."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    if decoder is None or head is None:
        return None
    training, model.training = model.training, True
    try:
        with torch.no_grad():
            return _tried(model, decoder, head)
    except Exception:  # a model's code can be anything
        return None
    finally:
        model.training = training


def allows_chunks(model: PreTrainedModel) -> bool:
    """Whether the loss of few rows at a time is the model's own, as far as can be told without weights."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    if decoder is None or head is None:
        return False
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=draw) for shape in ((2, 12, 4), (4, vocabulary(model))))
    labels = torch.arange(24).view(2, 12).masked_fill(torch.arange(12) % 5 == 1, IGNORED)
    ways = model.forward, Chunked(model, 8)
    try:
        with torch.no_grad(), in_place_of(head, lambda given: given @ weight):
            one, other = (_behind(decoder, hidden, whole, labels=labels).loss for whole in ways)
    except Exception:  # a model's code can be anything
        return False
    return bool(torch.isclose(one, other, rtol=1e-3))


@dataclass
class _Output(ModelOutput):  # type: ignore[misc]
    """A decoder's output, with whatever else a model asks it for: nothing."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _behind(decoder: nn.Module, hidden: torch.Tensor, whole: Callable[..., Any], **asked: Any) -> Any:
    """What a model, whose forward pass is `whole`, makes of its decoder's output, `hidden`."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with in_place_of(decoder, lambda *_, **__: _Output(last_hidden_state=hidden)):
        return whole(input_ids=ids, **asked)


def _tried(model: PreTrainedModel, decoder: nn.Module, head: nn.Module) -> Tail | None:
    hidden, width = torch.ones(2, 6, 4), vocabulary(model)
    labels = torch.arange(12).view(2, 6).masked_fill(torch.arange(6) == 3, IGNORED)
    seen: list[torch.Tensor] = []

    def of(z: torch.Tensor, **asked: Any) -> Any:
        def note(given: torch.Tensor) -> torch.Tensor:
            seen.append(given)
            return z.clone()

        with in_place_of(head, note):
            return _behind(decoder, hidden, model.forward, **asked)

    z = torch.linspace(-40, 40, 12 * width).view(2, 6, width).flip(-1)
    ends = z.clone()
    ends[0, 0, :2] = torch.tensor([1e-3, 1e9])
    low, high = of(ends).logits[0, 0, :2].double().tolist()
    scale = low / 1e-3
    tail = Tail(_rounded(scale), _rounded(high) if high < scale * 1e8 else None)
    logits = tail(z.double())
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    items = torch.tensor(7)
    pairs = [
        (of(z).logits, logits),
        (of(z, labels=labels, num_items_in_batch=items).loss, losses.sum() / items),
        (of(z, labels=labels).loss, losses.sum() / (labels[:, 1:] != IGNORED).sum()),
    ]
    same = all(torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5) for one, other in pairs)
    return tail if same and all(torch.equal(given, hidden) for given in seen) else None


def _rounded(value: float) -> float:
    """To what float32 tells of it."""
    return float(f"{value:.6g}")


def _agrees(model: PreTrainedModel, fused: FusedLoss) -> bool:
    """Whether loss and gradient are the model's own, with its weights and on its device."""
    weight, draw = model.get_output_embeddings().weight, torch.Generator().manual_seed(0)
    labels = torch.arange(24, device=model.device).view(2, 12)
    labels = labels.masked_fill(labels % 5 == 1, IGNORED)
    found = []
    try:
        hidden = torch.randn(2, 12, weight.shape[1], generator=draw).to(model.device, weight.dtype).requires_grad_()
        with torch.enable_grad():
            for whole in (model.forward, fused):
                loss = _behind(fused.decoder, hidden, whole, labels=labels).loss
                found.append((loss.detach().float(), torch.autograd.grad(loss, hidden)[0].float()))
    except Exception:  # a model's code can be anything
        return False
    (one, slope), (other, same) = found
    close = torch.isclose(one, other, rtol=1e-2, atol=1e-3) & ((slope - same).norm() <= 0.03 * slope.norm())
    return bool(close)


class FusedLoss:
    """A model's forward pass: where labels are given, its loss alone."""

    def __init__(self, model: PreTrainedModel, size: int, tail: Tail, gradient: Gradient = gradient_in_place) -> None:
        """`size`: bytes that logits in float32 may take at once; in 16 bits, as many rows take half."""
        decoder = decoder_of(model)
        assert decoder is not None
        self.model, self.decoder, self.whole = model, decoder, model.forward
        self.size, self.tail, self.gradient = size, tail, gradient
        self.always = True
        """Whether it computes the loss of batches, too, of which the model may take all logits."""

    @property
    def head(self) -> nn.Module:
        """As it is now: adapters may have come."""
        found: nn.Module = self.model.get_output_embeddings()
        return found

    def __call__(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        counts, weights = kwargs.pop(COUNTS, None), kwargs.pop(WEIGHTS, None)
        if weights is not None and (labels is None or not self.always):
            raise ValueError("only the fused loss can be weighted")
        if labels is None or (not self.always and labels.numel() <= rows_at_once(self.model, self.size)):
            return self.whole(*args, labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        with in_place_of(self.head, lambda hidden: hidden[..., :1]):
            hidden = decoded(self.decoder, self.whole, args, kwargs)[0]
        loss = self.of(hidden, labels.to(hidden.device), None if counts is None else sum(counts), weights)
        if items is None:
            items = (labels[:, 1:] != IGNORED).sum() if weights is None else weights[:, 1:].sum()
        return CausalLMOutput(loss=loss / items)

    def of(
        self, hidden: torch.Tensor, labels: torch.Tensor, count: int | None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum over `count` learnt tokens (None: they are counted), in nats, of hidden states [rows, tokens, size]
        and labels [rows, tokens], each of which the state before its own predicts, and counts by its weight."""
        classes = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        learnt = classes != IGNORED
        # In their order, those that are learnt first: as nonzero, which would wait for the device.
        places = learnt.byte().argsort(descending=True, stable=True)[: int(learnt.sum()) if count is None else count]
        trained = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        shares = None if weights is None else pad(weights[:, 1:], (0, 1)).to(hidden.device).flatten()
        slopes = torch.is_grad_enabled()
        total: torch.Tensor = _HeadLoss.apply(self, places, classes, shares, slopes, hidden, *trained)  # type: ignore[no-untyped-call]
        return total

    def parts(self, places: torch.Tensor) -> Sequence[torch.Tensor]:
        """Chunks of `places` that are alike in size."""
        most = max(rows_at_once(self.model, self.size), 2)
        most -= most % WHOLE_TILES if most > WHOLE_TILES else 0
        size = -(-len(places) // max(-(-len(places) // most), 1))
        size = min(-(-size // WHOLE_TILES) * WHOLE_TILES, most)
        return torch.split(places, size) if len(places) else ()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: FusedLoss,
        places: torch.Tensor,
        classes: torch.Tensor,
        shares: torch.Tensor | None,
        slopes: bool,
        hidden: torch.Tensor,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        rows, wants = hidden.detach().flatten(0, 1), ctx.needs_input_grad[5]
        found: list[torch.Tensor | None] = [torch.zeros_like(rows) if wants else None, *[None] * len(trained)]
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        for part in fused.parts(places):
            given = rows[part][None].requires_grad_(wants)
            wanted = [*([given] if wants else []), *trained] if slopes else []
            loss, own = _of_chunk(fused, given, classes[part], None if shares is None else shares[part], wanted)
            total += loss
            if slopes:
                _add_slopes(found, part, own if wants else (None, *own))
        ctx.found, ctx.shape, ctx.dtypes = found, hidden.shape, [each.dtype for each in trained]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("the loss's gradient was taken before, and is kept for once")
        hidden, *trained = [each if each is None else each.mul_(slope) for each in found]
        own = [each if each is None else each.to(dtype) for each, dtype in zip(trained, ctx.dtypes, strict=True)]
        return None, None, None, None, None, hidden if hidden is None else hidden.view(ctx.shape), *own


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _of_chunk(
    fused: FusedLoss,
    given: torch.Tensor,
    classes: torch.Tensor,
    shares: torch.Tensor | None,
    wanted: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The sum of the losses of hidden states [1, rows, size], of each its share, and its gradients with respect to what
    is `wanted`."""
    with torch.set_grad_enabled(bool(wanted)):
        z = fused.head(given)
    # The head's own backward pass needs its inputs alone; torch refuses if it should need its outputs, changed here.
    slope = z.detach()
    losses = fused.gradient(slope[0], classes, fused.tail)
    if shares is not None:
        losses = losses * shares
        slope *= shares[:, None]
    loss = losses.sum()
    return loss, torch.autograd.grad(z, wanted, slope, allow_unused=True) if wanted else ()


def _add_slopes(found: list[torch.Tensor | None], part: torch.Tensor, slopes: Sequence[torch.Tensor | None]) -> None:
    """Add a chunk's gradients, of its hidden states first, to those of all."""
    if found[0] is not None:
        found[0].index_copy_(0, part, slopes[0][0].to(found[0].dtype))  # type: ignore[index]
    for number, each in enumerate(slopes[1:], 1):
        if each is None:
            continue
        if found[number] is None:  # a sum of its own: what is returned may be another's too
            found[number] = torch.zeros(each.shape, dtype=_wide(each), device=each.device)
        found[number].add_(each)  # type: ignore[union-attr]
