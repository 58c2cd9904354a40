"""Training on rows of several sequences, each of which sees itself alone.

Position ids that begin anew tell transformers where sequences end, and each model's own masks (of windows, too) keep
them apart. On a GPU no mask is needed where torch's attention of variable lengths computes the same: a layer that sees
all of its sequence, in 16 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qft.memory.attention import FLASH_LARGEST_HEAD
from qft.memory.unmasked import ALIKE, SAME, difference

HALF = (torch.float16, torch.bfloat16)
KNOWN = inspect.signature(varlen_attn).parameters
CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in KNOWN else {"is_causal": True}
"""torch 2.10 has no windows."""
SEES_ALL = {"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"}
"""Kinds of layers that see nothing but what a mask lets them see."""
LENGTHS = (7, 12, 5)
"""Of the sequences that are tried."""

Lengths = Sequence[Sequence[int]]
"""Of the sequences in each row of a batch, in tokens, without the padding behind the last."""


def cannot_pack(model: Any) -> str | None:
    """Why no sequences can share a row, as far as a skeleton tells; None: they may, if `packs_as_alone`."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - SEES_ALL:
        named = ", ".join(sorted(kinds - SEES_ALL)) or "a state"
        return f"{type(model).__name__} has layers that pass on what came before ({named}), across the border of a row"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids, by which it would know where a row begins"
    in_chunks = "chunked_attention" in kinds and not hasattr(masking_utils, "remap_positions_for_packed_sequence")
    return f"{type(model).__name__} attends in chunks, which begin where its whole row does" if in_chunks else None


def needs_masks(attention: str, dtype: torch.dtype, *, on_gpu: bool) -> bool:
    """Whether masks tell sequences apart, rather than kernels that take their lengths; `dtype`: of queries."""
    return attention == "eager" or (attention == "sdpa" and not (on_gpu and dtype in HALF))


def packs_as_alone(model: Any, mixed: torch.dtype | None = None, *, exact: bool = True) -> bool:
    """Whether the logits of a sequence are the same whatever shares its row, and as they are alone; tried on the loaded
    model, under autocast to `mixed`. `exact`: tokens do not change how others are rounded."""
    training, device = model.training, model.device.type
    try:
        with torch.no_grad(), torch.autocast(device, dtype=mixed or torch.bfloat16, enabled=mixed is not None):
            return _agree(model.eval(), exact)
    except Exception:  # a model's code can be anything
        return False
    finally:
        model.train(training)


def _agree(model: Any, exact: bool) -> bool:
    count = model.get_input_embeddings().weight.shape[0]
    first, second, third = torch.split(torch.arange(sum(LENGTHS), device=model.device) * 7 % count, [*LENGTHS])
    positions = torch.cat([torch.arange(length, device=model.device) for length in LENGTHS])[None]

    def packed(*sequences: torch.Tensor) -> torch.Tensor:
        with sequences_apart([LENGTHS], model, positions.shape[1]) as known:
            out = model(input_ids=torch.cat(sequences)[None], position_ids=positions, use_cache=False, **known)
        logits: torch.Tensor = out.logits[0, LENGTHS[0] : sum(LENGTHS[:2])].float()
        return logits

    one, other = packed(first, second, third), packed((first + 3) % count, second, (third + 5) % count)
    alone = model(input_ids=second[None], use_cache=False).logits[0].float()
    return difference(one, other) <= (SAME if exact else ALIKE) and difference(one, alone) <= ALIKE


@contextmanager
def sequences_apart(lengths: Lengths, model: Any, width: int) -> Iterator[dict[str, Any]]:
    """While entered, in forward passes and backward passes, the sequences in rows of `width` tokens do not see each
    other. Gives what the model is to be told beside position_ids: flash attention takes lengths."""
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name)
    setattr(masking_utils, name, _numbers)
    try:
        if model.device.type != "cuda":
            yield {}
            return
        borders = Borders(lengths, model.device, width)
        with _without_masks(borders):
            takes_lengths = model.config.get_text_config()._attn_implementation.startswith("flash")
            yield borders.arguments if takes_lengths else {}
    finally:
        setattr(masking_utils, name, found)


def _numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Of each token, the number of its sequence; transformers' own waits for the device to see whether there is one."""
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return starts.cumsum(-1)


class Borders:
    """Where sequences begin and end among the tokens of a batch, padding being one more of them."""

    def __init__(self, lengths: Lengths, device: torch.device, width: int) -> None:
        filled = [[*row, *([width - sum(row)] if sum(row) < width else [])] for row in lengths]
        flat = [length for row in filled for length in row]
        self.ends = torch.tensor([0, *flat]).cumsum(0).int().to(device, non_blocking=True)
        """int32 [sequences + 1]."""
        self.longest = max(flat)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of transformers' flash attention."""
        return {
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.ends),
            **dict.fromkeys(("max_length_q", "max_length_k"), self.longest),
        }


@contextmanager
def _without_masks(borders: Borders) -> Iterator[None]:
    """While entered, layers of sdpa that see all of their sequence take `borders` in place of a mask."""
    mask, attend = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def masked(*args: Any, **kwargs: Any) -> Any:
        window = kwargs.get("local_size")
        sees_all = (window is None or window >= borders.longest) and not kwargs.get("use_vmap")
        return None if sees_all else mask(*args, **kwargs)

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        causal = kwargs.get("is_causal")
        if attention_mask is not None or not (getattr(module, "is_causal", True) if causal is None else causal):
            return attend(module, query, key, value, attention_mask, **kwargs)
        q, k, v = _cast(query, key, value)
        if not _has_kernel(q, k, v, kwargs):
            return attend(module, query, key, value, _mask_of(borders, query), **kwargs)
        return _varlen(q, k, v, borders, kwargs.get("scaling")), None

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["sdpa"] = masked, attention
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["sdpa"] = mask, attend


def _cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As autocast would."""
    mixed = torch.is_autocast_enabled("cuda")
    return [x.to(torch.get_autocast_dtype("cuda")) if mixed else x for x in tensors]


def _has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether there is one that takes lengths for these, which are laid out as `_varlen` has them."""
    asked = any(kwargs.get(name) for name in ("dropout", "softcap")) or kwargs.get("position_bias") is not None
    same = query.shape[-1] == key.shape[-1] == value.shape[-1] <= FLASH_LARGEST_HEAD
    return same and query.dtype in HALF and query.shape[2] == key.shape[2] and not asked


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: Borders, scale: float | None
) -> torch.Tensor:
    """[rows, tokens, heads, size] of queries [rows, heads, tokens, size], and of keys and values of as many heads or a
    divisor of them."""
    rows, heads, tokens, size = query.shape
    told: dict[str, Any] = dict(CAUSAL)
    if scale is not None and "scale" in KNOWN:
        told["scale"] = scale
    elif scale is not None:
        query = query * (scale * size**0.5)
    if key.shape[1] != heads and "enable_gqa" in KNOWN:
        told["enable_gqa"] = True
    else:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    told |= dict(zip(("query", "key", "value"), (_flat(x) for x in (query, key, value)), strict=True))
    told |= dict.fromkeys(("cu_seq_q", "cu_seq_k"), borders.ends) | dict.fromkeys(("max_q", "max_k"), borders.longest)
    out: Any = varlen_attn(**told)
    made: torch.Tensor = out.view(rows, tokens, heads, size)
    return made


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, tokens, size] as [rows x tokens, heads, size]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _mask_of(borders: Borders, query: torch.Tensor) -> torch.Tensor:
    """bool [rows, 1, tokens, tokens]: what each token sees."""
    rows, _, tokens, _ = query.shape
    places = torch.arange(rows * tokens, device=query.device)
    number = torch.bucketize(places, borders.ends.long(), right=True).view(rows, 1, tokens)
    same = number[..., :, None] == number[..., None, :]
    return same & torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
