"""Checkpoints that come in few bits, seen as those of the weights that they stand for: which tensors make up a weight,
told from headers, for each method by which `quantization_config` may say that they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qft.checkpoint.stored import DTYPES, Packed, Stored
from qft.checkpoint.unpack import (
    awq,
    bnb_4bit,
    bnb_8bit,
    gpt_oss,
    gptq,
    hqq,
    packed_floats,
    packed_integers,
    scaled,
    torchao,
)
from qft.errors import ModelError, first_line

Config = Mapping[str, Any]
Values = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a method writes its weights."""

    ends: Mapping[str, tuple[str, str]]
    """Of the names of what a weight is made of: what each ends in, what that is, and in what the weight's ends."""
    values: Callable[[Config, Mapping[str, Stored], Mapping[str, torch.Tensor]], Values]
    """From the configuration, headers and small tensors of a weight's parts."""
    idle: tuple[str, ...] = ()
    """Ends of names that say how activations are rounded, which they no longer are."""
    known: tuple[str, ...] = ()
    """Parts whose values are looked at before the others are read."""
    beside: bool = False
    """Whether the numbers are under the weight's own name: what only ends so is something else."""
    core: str = ""
    """The part without which others that end so are something else."""


def _compressed(config: Config, parts: Mapping[str, Stored], known: Mapping[str, torch.Tensor]) -> Values:
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    sizes = {group.get("group_size") for group in groups}
    size = sizes.pop() if len(sizes) == 1 else None
    if "shape" in parts:
        (rows, columns), words = map(int, known["shape"].tolist()), parts["packed"].shape[-1]
        widths = {group["num_bits"] for group in groups if -(-columns * group["num_bits"] // 32) == words}
        if len(widths) != 1:
            raise ValueError(f"{words} words for {columns} numbers are not of the bits that its configuration says")
        return partial(packed_integers, shape=(rows, columns), bits=widths.pop(), group=size)
    if "packed" in parts:
        return packed_floats
    blocks = [group.get("block_structure") for group in groups]
    return partial(scaled, blocks=blocks[0] or ((1, size) if size else ()))


def _bitsandbytes(config: Config, parts: Mapping[str, Stored], known: Mapping[str, torch.Tensor]) -> Values:
    if "SCB" in parts:
        return bnb_8bit
    return partial(bnb_4bit, state=json.loads(bytes(known["state"].tolist())))


def _gptq(config: Config, parts: Mapping[str, Stored], known: Mapping[str, torch.Tensor]) -> Values:
    first = config.get("checkpoint_format", "gptq") == "gptq"
    return partial(gptq, bits=config["bits"], group=config.get("group_size", 128), first=first)


def _hqq(config: Config, parts: Mapping[str, Stored], known: Mapping[str, torch.Tensor]) -> Values:
    packing = bytes(known["packing"].tolist()).decode()
    floats = bool(known["view_as_float"]) if "view_as_float" in known else False
    return partial(hqq, shape=tuple(known["shape"].tolist()), bits=int(packing.partition("bit")[0]), floats=floats)


def _after_weight(**ends: str) -> dict[str, tuple[str, str]]:
    return {f"weight_{end}": (what, "weight") for end, what in ends.items()}


_GPTQ = {name: (name, "weight") for name in ("qweight", "qzeros", "scales", "g_idx")}
_BNB = {f"weight.{name}": (name, "weight") for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
LAYOUTS = {
    "compressed-tensors": Layout(
        _after_weight(packed="packed", scale="scale", shape="shape", zero_point="zero_point", g_idx="g_idx",
                      global_scale="global_scale"),
        _compressed,
        ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
        ("shape",),
    ),
    "gptq": Layout(_GPTQ, _gptq),
    "awq": Layout(_GPTQ, lambda config, parts, known: partial(awq, bits=config["bits"])),
    "fp8": Layout(
        {"_scale_inv": ("scale", ""), "weight_scale": ("scale", "weight")},
        lambda config, parts, known: partial(scaled, blocks=tuple(config.get("weight_block_size") or ())),
        ("activation_scale", "input_scale"),
        beside=True,
    ),
    "fbgemm_fp8": Layout({"_scale": ("scale", "")}, lambda *_: scaled, ("input_scale_ub",), beside=True),
    "mxfp4": Layout({"_blocks": ("blocks", ""), "_scales": ("scales", "")}, lambda *_: gpt_oss),
    "bitsandbytes": Layout(
        {**_BNB, "SCB": ("SCB", "weight"),
         **{f"weight.quant_state.bitsandbytes__{kind}": ("state", "weight") for kind in ("nf4", "fp4")}},
        _bitsandbytes,
        ("weight_format",),
        ("state",),
    ),
    "torchao": Layout(
        {f"_weight_{name}": (name, "weight")
         for name in ("qdata", "scale", "zero_point", "act_pre_scale", "scale_and_zero", "per_tensor_scale")},
        lambda *_: torchao,
    ),
    "hqq": Layout(
        {name: (name, "weight") for name in ("W_q", "scale", "zero", "shape", "packing", "view_as_float")},
        _hqq,
        ("nbits", "group_size", "axis", "unpack_view_dtype", "compute_dtype", "quant_zero", "quant_scale",
         "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
        ("shape", "packing", "view_as_float"),
        core="W_q",
    ),
}  # fmt: skip
"""By quant_method."""
HELD = ("gptq", "awq", "mxfp4", "compressed-tensors", "torchao", "hqq")
"""Methods of which weights can stay as the files have them."""
BLIND = {
    "compressed-tensors": ("format", ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")),
    "gptq": ("checkpoint_format", ("marlin", "bitblas", "gemm")),
    "awq": ("version", ("gemv", "gemv_fast", "marlin", "llm-awq")),
}
"""Of a method, the key that tells of other layouts, and those."""


def method_of(config: Config) -> str:
    """quant_method: bitsandbytes, gptq, awq, compressed-tensors, torchao, …"""
    name = config.get("quant_method", "unknown")
    name = str(getattr(name, "value", name))
    return "bitsandbytes" if "bitsandbytes" in name else name


def unpack_problem(config: Config) -> str | None:
    """Why weights of that configuration cannot be dequantized; None if they can."""
    method = method_of(config)
    if method not in LAYOUTS:
        return f"{method} is none of the methods that are known ({', '.join(LAYOUTS)})"
    key, others = BLIND.get(method, ("", ()))
    kind = str(config.get(key, "")).rpartition(".")[2].lower()
    if kind in others:
        return f"its {key} {kind} is another layout than those that are known"
    return None


def is_held(config: Config) -> bool:
    """Whether adapters can be trained on weights as they are in the files: those whose layout is known, where nothing
    but them is rounded."""
    method = method_of(config)
    return method in HELD and not rounds_inputs(config) and unpack_problem(config) is None


def rounds_inputs(config: Config) -> bool:
    """Whether layers of that configuration round what they are multiplied with too."""
    groups = (config.get("config_groups") or {}).values()
    return (
        method_of(config) in ("fp8", "fbgemm_fp8")
        or any(group.get("input_activations") for group in groups)
        or bool(re.search(r"Activation\w*Config", json.dumps(config.get("quant_type"), default=str)))
    )


def unpacked(stored: Mapping[str, Stored], config: Config, dtype: torch.dtype) -> dict[str, Stored]:
    """Every tensor of a checkpoint, and in the place of packed ones the weights that they make, in `dtype`. Raises
    ModelError for parts that make none."""
    layout = LAYOUTS[method_of(config)]
    kind = next(name for name, own in DTYPES.items() if own == dtype)
    groups = _groups(layout, stored)
    if not groups:
        where = next(iter(stored.values())).path.parent if stored else "it"
        text = f"its configuration says that it is quantized with {method_of(config)}"
        raise ModelError(f"{where}: {text}, and its files hold no such weight")
    taken = {name for parts in groups.values() for name in parts.values()}
    found = {name: tensor for name, tensor in stored.items() if name not in taken and not _is_idle(layout, name)}
    read = _Reader()
    for target, names in groups.items():
        parts = {what: stored[name] for what, name in names.items()}
        path = next(iter(parts.values())).path
        known = {what: read(parts[what].path, names[what]) for what in layout.known if what in names}
        try:
            values = layout.values(config, parts, known)
            parts = {what: part for what, part in parts.items() if what not in known}
            shape = values({what: part.empty() for what, part in parts.items()}).shape
        except Exception as error:  # of parts that do not fit each other
            reason = f"lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise ModelError(f"{path}: {target} cannot be dequantized: {reason}") from error
        size = sum(part.empty().nbytes for part in parts.values())
        places = {what: (part.path, names[what]) for what, part in parts.items()}
        found[target] = Stored(path, tuple(shape), kind, Packed(places, values, size))
    return found


def _groups(layout: Layout, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
    """By the weight's name, the names of its parts."""
    groups = dict[str, dict[str, str]]()
    for name in stored:
        for end, (what, own) in layout.ends.items():
            target = name.removesuffix(end) + own
            if _ends(name, end) and (target in stored or not layout.beside) and not _is_idle(layout, name):
                groups.setdefault(target, {})[what] = name
                break
    for target, parts in groups.items():
        if target in stored:
            parts["weight"] = target
    return {target: parts for target, parts in groups.items() if layout.core in ("", *parts)}


def _ends(name: str, end: str) -> bool:
    return name.endswith(end if end.startswith("_") else f".{end}")


def _is_idle(layout: Layout, name: str) -> bool:
    return any(_ends(name, end) for end in layout.idle)


class _Reader:
    """Tensors of one file after the other, whose headers may be long."""

    def __init__(self) -> None:
        self._open: tuple[Path, Any] | None = None

    def __call__(self, path: Path, name: str) -> torch.Tensor:
        if self._open is None or self._open[0] != path:
            self._open = path, safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[1].get_tensor(name)
        return tensor
