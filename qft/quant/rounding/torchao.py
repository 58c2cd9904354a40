"""Activations as torchao rounds them, by torchao itself, beside weights of its 8da4w (int8 dynamic activations, int4
weights)."""

from typing import Any

import torch

from qft.quant.rounding.base import Rounded


def asymmetric_int8(inputs: torch.Tensor) -> Rounded:
    """Activations [..., in] in 8 bits from their least to their largest, each token with its own scale and zero point.
    Values are in the activations' dtype. Raises ImportError without torchao, in which alone they are written."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    token, kind = (*[1] * (inputs.ndim - 1), inputs.shape[-1]), torch.int8
    ends: dict[str, Any] = {"quant_min": -128, "quant_max": 127}
    scale, zero = choose_qparams_affine(
        inputs, MappingType.ASYMMETRIC, token, target_dtype=kind, zero_point_dtype=kind, **ends
    )
    codes = quantize_affine(inputs, token, scale, zero, output_dtype=kind, **ends)
    return Rounded(dequantize_affine(codes, token, scale, zero, kind, output_dtype=inputs.dtype, **ends), None)
