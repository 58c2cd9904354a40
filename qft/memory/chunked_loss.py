"""The loss of a causal language model from the logits of few rows at a time: all at once they can outweigh the model.

What stands behind the decoder (head, scales, soft caps, the loss) stays the model's own code: it is run on parts of the
decoder's output, and again for the backward pass.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qft.kernels.in_place import in_place_of

LOGITS, FEW_LOGITS = 2**29, 2**27
"""Bytes that logits in float32 may take at once, and where memory is scarce; what the loss and its gradient make of
them takes three times that."""


def rows_at_once(model: PreTrainedModel, size: int) -> int:
    """Rows whose logits in float32 take no more than `size` bytes."""
    return max(size // (4 * vocabulary(model)), 2)


def vocabulary(model: PreTrainedModel) -> int:
    """Outputs of its head."""
    found: int = model.get_output_embeddings().weight.shape[0]
    return found


def chunk_loss(model: PreTrainedModel, rows: int) -> bool:
    """Have the model's loss computed from `rows` logits at a time. Returns whether it is: a model whose own loss on a
    few tokens is another one keeps that."""
    if not _agrees(model):
        return False
    replace_forward(model, rows)
    return True


def replace_forward(model: PreTrainedModel, rows: int, **again: Any) -> None:
    """As chunk_loss, whether it agrees or not; `again` are arguments of torch's checkpoint."""
    model.forward = functools.wraps(model.forward)(Chunked(model, rows, **again))


class _Reached(Exception):
    """A module was called."""


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """What the model calls first of the modules around its input embeddings: not always its base model, which OPT, say,
    goes past. None: it is no decoder with something behind it, or its loss is not one of tokens alone. Needs no
    weights."""
    if getattr(model.config, "output_router_logits", False):
        return None

    def reached(module: nn.Module) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            raise _Reached(module)

        return forward

    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with ExitStack() as entered:
        try:
            for module in _around_embeddings(model):
                entered.enter_context(in_place_of(module, reached(module)))
            model.forward(input_ids=ids)
        except _Reached as found:
            decoder: nn.Module = found.args[0]
            return decoder
        except Exception:  # a model's code can be anything
            return None
    return None


def _around_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """From the outermost one within the model."""
    table = model.get_input_embeddings()
    path: list[str] = next((name.split(".") for name, module in model.named_modules() if module is table), [])
    return [model.get_submodule(".".join(path[:length])) for length in range(1, len(path))]


def _agrees(model: PreTrainedModel) -> bool:
    if decoder_of(model) is None:
        return False
    ids = torch.arange(24, device=model.device).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids % 5 == 1), -100)}
    try:
        with torch.no_grad():
            one, other = (forward(**asked).loss.float() for forward in (model.forward, Chunked(model, 8)))
    except Exception:  # a model can be anything
        return False
    return bool(torch.isclose(one, other, rtol=1e-2, atol=1e-3))


class Chunked:
    """A model's forward pass: where labels are given, its loss alone."""

    def __init__(self, model: PreTrainedModel, rows: int, **again: Any) -> None:
        decoder = decoder_of(model)
        assert decoder is not None
        self.decoder, self.whole, self.rows, self.again = decoder, model.forward, rows, again

    def __call__(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or labels.numel() <= self.rows:
            return self.whole(*args, labels=labels, **kwargs)
        if kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = (labels[:, 1:] != -100).sum()
        output = decoded(self.decoder, self.whole, args, kwargs)
        mask, step = kwargs.pop("attention_mask", None), max(self.rows // len(labels) - 1, 1)

        def loss(hidden: torch.Tensor, start: int) -> torch.Tensor:
            """Of the labels behind `start`, each by the row before its own: the model itself shifts them."""
            part = slice(start, start + step + 1)
            own = kwargs if mask is None else kwargs | {"attention_mask": mask[:, part]}
            with in_place_of(self.decoder, lambda *_, **__: _with_rows(output, hidden[:, part])):
                found: torch.Tensor = self.whole(*args, labels=labels[:, part], **own).loss
                return found

        starts = range(0, labels.shape[1] - 1, step)
        losses = [checkpoint(loss, output[0], start, use_reentrant=False, **self.again) for start in starts]
        return CausalLMOutput(loss=torch.stack(losses).sum())


def decoded(decoder: nn.Module, whole: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the decoder returns to the model, whose forward pass is `whole`, and which goes on with one row of it."""
    decode, outputs = decoder.forward, []

    def forward(*own: Any, **others: Any) -> Any:
        outputs.append(decode(*own, **others))
        return _with_rows(outputs[0], outputs[0][0][:, :1])

    with in_place_of(decoder, forward):
        whole(*args, **kwargs)
    return outputs[0]


def _with_rows(output: Any, rows: torch.Tensor) -> Any:
    """What a decoder returned, with other hidden states."""
    if isinstance(output, tuple):
        return (rows, *output[1:])
    return type(output)(**{**output, "last_hidden_state": rows})
