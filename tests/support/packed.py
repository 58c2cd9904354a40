"""Tiny checkpoints that come quantized, written by hand or by the libraries that write such, and what their weights
mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.mixtures import write_mixture
from tests.support.models import byte_tokenizer, tiny_llama

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors by the ends of their names, and the weight [out, in] that they mean."""
GROUP = 32


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers [rows, n] in rows of 32-bit words, one bit after the other."""
    rows = []
    for row in numbers.tolist():
        whole = sum(int(number) << (bits * place) for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        parts = [(whole >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
        rows.append([part - 2**32 if part >= 2**31 else part for part in parts])
    return torch.tensor(rows, dtype=torch.int32)


def _grid(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [out, in], zeros and float16 scales [out, groups] of groups between their extremes."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.view(weight.shape).long(), zero.long(), scale


def _meant(numbers: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return (numbers - zero[:, order]) * scale.float()[:, order]


def gptq(weight: torch.Tensor, bits: int = 4, first: bool = True) -> Packed:
    """With columns that are not in the order of their groups."""
    order = torch.arange(weight.shape[1]).flip(0)
    numbers, zero, scale = _grid(weight[:, order], bits)
    numbers, index = numbers[:, order], (torch.arange(weight.shape[1]) // GROUP).flip(0)
    stored = (zero - int(first)) % 2**bits
    tensors = {"qweight": words(numbers, bits).T, "qzeros": words(stored.T, bits), "scales": scale.T}
    return tensors | {"g_idx": index.int()}, _meant(numbers, zero, scale, index)


def awq(weight: torch.Tensor) -> Packed:
    numbers, zero, scale = _grid(weight, 4)
    order = [place + 8 * word for word in range(len(weight) // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {"qweight": words(numbers.T[:, order], 4), "qzeros": words(zero.T[:, order], 4), "scales": scale.T}
    return tensors, _meant(numbers, zero, scale, torch.arange(weight.shape[1]) // GROUP)


def torchao(weight: torch.Tensor, kind: str) -> Packed:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.float()
    settings: dict[str, Any] = {
        "int8": Int8WeightOnlyConfig(set_inductor_config=False, version=2),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),  # type: ignore[attr-defined]
        "fp8": Float8WeightOnlyConfig(),
    }
    quantize_(layer, settings[kind])
    tensors, _ = flatten_tensor_state_dict({"layer.weight": layer.weight.data})
    whole: Any = layer.weight.data
    return {name.removeprefix("layer."): part for name, part in tensors.items()}, whole.dequantize().float()


def hqq(weight: torch.Tensor, bits: int = 4, axis: int = 1) -> Packed:
    """As hqq.core.quantize has it, with what it notes of a layer as tensors."""
    flat = weight.float().view(-1, GROUP) if axis else weight.float().view(GROUP, -1)
    low, high = flat.amin(axis, keepdim=True), flat.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).half()
    numbers = (flat / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).int()
    each, kind = (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)
    rows = -(-len(numbers) // each)
    filled = torch.nn.functional.pad(numbers, (0, 0, 0, rows * each - len(numbers)))
    packed = torch.zeros(rows, numbers.shape[1], dtype=torch.int32)
    for place in range(each):
        packed |= filled[place * rows : (place + 1) * rows] << bits * (each - 1 - place)
    name = f"{bits}bit_{'32' if bits == 3 else 'u8'}"
    noted = {"nbits": bits, "group_size": GROUP, "axis": axis, "encoded_state_dict": 1, "view_as_float": 0}
    tensors = {"W_q": packed.to(kind), "scale": scale, "zero": zero, "shape": torch.tensor(weight.shape)}
    tensors |= {"packing": torch.tensor([*name.encode()], dtype=torch.uint8)}
    tensors |= {key: torch.tensor(value, dtype=torch.int32) for key, value in noted.items()}
    return tensors, ((numbers - zero.float()) * scale.float()).view(weight.shape)


def block_fp8(weight: torch.Tensor) -> Packed:
    """Blocks of 48, of which the last ones are smaller."""
    rows, columns = (-(-size // 48) for size in weight.shape)
    scale, whole = torch.rand(rows, columns) + 0.5, torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            whole[row, column] = scale[row // 48, column // 48]
    numbers = (weight.float() / whole).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale}, numbers.float() * whole


def row_fp8(weight: torch.Tensor) -> Packed:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale, "input_scale_ub": torch.ones(1)}, numbers.float() * scale


def compressed(weight: torch.Tensor, kind: str, **arguments: Any) -> Packed:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme: Any = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**WEIGHTS | arguments))
    args, size = scheme.weights, scheme.weights.group_size or weight.shape[1]
    groups = weight.float().view(len(weight), -1, size)
    low, high, state = groups.amin(-1), groups.amax(-1), dict[str, torch.Tensor]()
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.float().amin(), weight.float().amax())
    scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state |= {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    compressor: Any = BaseCompressor.get_value_from_registry(kind)
    made = compressor.compress(state, scheme)
    return made, compressor.decompress(dict(made), scheme)["weight"].float()


WEIGHTS: dict[str, Any] = {"type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}


def bnb(weight: torch.Tensor, kind: str) -> Packed:
    import bitsandbytes.functional as bnb

    if kind == "int8":
        scale = weight.float().abs().amax(1)
        numbers = (weight.float() * 127 / scale[:, None]).round().to(torch.int8)
        return {"weight": numbers, "SCB": scale}, numbers * scale[:, None] / 127
    codes, state = bnb.quantize_4bit(weight.float(), quant_type=kind, compress_statistics=True)
    tensors = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": codes, **tensors}, bnb.dequantize_4bit(codes.view(-1, 1), _flat(state)).view(weight.shape)


def _flat(state: Any) -> Any:
    """On CPUs, bitsandbytes takes blocks of a matrix to end with its rows; those of a vector it reads right."""
    state.shape = torch.Size([state.shape.numel()])
    return state


def _group(**arguments: Any) -> dict[str, Any]:
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | arguments}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False, "desc_act": True}
TORCHAO = {"int8": "Int8WeightOnlyConfig", "int4": "IntxWeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
INT4 = {"num_bits": 4, "symmetric": False}
INT8 = {"num_bits": 8, "strategy": "channel", "group_size": None}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
MXFP4 = {"num_bits": 4, "type": "float", "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}  # fmt: skip


def _compressed(kind: str, **arguments: Any) -> tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]:
    plain = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in arguments.items()}
    config = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return config | _group(**plain), lambda weight: compressed(weight, kind, **arguments)


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]] = {
    "gptq": (GPTQ | {"bits": 4, "checkpoint_format": "gptq"}, gptq),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, lambda weight: gptq(weight, 3)),
    "gptq of the second version": (
        GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}, lambda weight: gptq(weight, 4, first=False)
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, block_fp8),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, row_fp8),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            lambda weight: bnb(weight, "nf4")),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda weight: bnb(weight, "int8")),
    **{f"torchao {kind}": ({"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_data": {}}}},
                           partial(torchao, kind=kind))
       for kind, name in TORCHAO.items()},
    "hqq": (HQQ, hqq),
    "hqq of 3 bits": (HQQ, partial(hqq, bits=3, axis=0)),
    "compressed int4": _compressed("pack-quantized", **INT4),
    "compressed int8": _compressed("int-quantized", **INT8),
    "compressed fp8": _compressed("float-quantized", **FP8),
    "compressed mxfp4": _compressed("mxfp4-pack-quantized", **MXFP4),
    "compressed nvfp4": _compressed("nvfp4-pack-quantized", **NVFP4),
}  # fmt: skip
"""The quantization_config, and what makes of a weight [out, in] what is written of it."""


def pack(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """Quantize the model in `folder`, but for its ends and vectors. Returns the weights that it then means."""
    config, packer = LAYOUTS[layout]
    tensors, meant = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, meant[name] = packer(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    _write(folder, tensors, config)
    return meant


def packed_model(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """A tiny model whose weights come so: a Llama, or the kind of mixture that is named before a colon; a gpt-oss of
    `mxfp4`. Returns what they mean."""
    kind, _, layout = layout.rpartition(":")
    if kind or layout == "mxfp4":
        write_mixture(folder, kind or "gpt_oss")
    else:
        tiny_llama(num_hidden_layers=1).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return pack_gpt_oss(folder) if layout == "mxfp4" else pack(folder, layout)


def pack_gpt_oss(folder: Path) -> dict[str, torch.Tensor]:
    """The same of the experts of a gpt-oss, in the MXFP4 that it is published in."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, meant = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name, weight in list(tensors.items()):
        if name.endswith("_proj") and weight.ndim == 3:
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            meant[name] = convert_moe_packed_tensors(blocks, scales)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return meant


def _write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
