"""AutoRound (arXiv:2309.05516) by auto-round: scales, and with `iters` the rounding, chosen by the block's output."""

import os
from dataclasses import replace
from typing import Any

import torch
from auto_round import AutoRound as Tuner
from auto_round.modeling.fused_moe import replace_modules
from torch import nn

from qft.quant.engines.base import Block, QuantizedLayer, linear_of
from qft.quant.engines.compressed import CompressedTensors, hold
from qft.quant.engines.rtn import RoundToNearest
from qft.quant.layer import LayerScheme

# auto-round refuses zero points of 8 bits for the sake of formats that lack them; compressed-tensors has them.
os.environ.setdefault("AR_ALLOW_W8_ASYM", "1")
# It would put layers in the place of a mixture's experts, which stay as they are: of a model without a configuration.
if hasattr(replace_modules, "MOE_SKIP_PREFIXES"):
    replace_modules.MOE_SKIP_PREFIXES[None] = ["layers."]

BATCH = 8
"""Windows of one tuning step, auto-round's own default."""


class AutoRound(CompressedTensors):
    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        before: list[Any] = [block.module.get_submodule(name) for name in block.schemes]
        originals = [linear_of(layer.weight.detach().clone(), layer.bias) for layer in before]
        _tune(block)
        tuned = {name: block.module.get_submodule(name) for name in block.schemes}
        # auto-round leaves out layers of which 32 does not divide the inputs or the outputs.
        left = {name: scheme for name, scheme in block.schemes.items() if not hasattr(tuned[name], "scale")}
        pairs = zip(originals, block.schemes.items(), strict=True)
        held = {name: _hold(one, tuned[name], scheme) for one, (name, scheme) in pairs if name not in left}
        rounded = RoundToNearest().quantize(replace(block, schemes=left))
        return {name: (held | rounded)[name] for name in block.schemes}


class _Alone(nn.Module):
    """What auto-round takes for a model: the block, and nothing around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = None
        self.name_or_path = ""
        parameter = next(block.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layers[0](*args, **kwargs)


def _tune(block: Block) -> None:
    """Replace the weights of block.module by their rounded values, and leave scales and zero points beside them."""
    parameter = next(block.module.parameters())
    device, dtype = str(parameter.device), parameter.dtype
    linears = [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]
    first = next(iter(block.schemes.values()))
    tuner = Tuner(
        model=_Alone(block.module),
        tokenizer="",
        scheme=_settings(first),
        layer_config={f"layers.0.{name}": _settings(block.schemes.get(name)) for name in linears},
        iters=block.iters,
        nsamples=len(block.calls),
        batch_size=min(BATCH, len(block.calls)),
        low_gpu_mem_usage=True,
        enable_torch_compile=False,
        device_map=device,
        seed=block.seed,
        scale_dtype=dtype,
        amp=dtype != torch.float32,  # else float32 would be rounded to bfloat16
    )
    inputs, quantized = [(call,) for call in block.calls], list(block.quantized_inputs) or None
    with torch.enable_grad():
        tuner.quantize_block(block.module, inputs, q_input=quantized, device=device, auto_offload=False)
    block.module.to(dtype)  # auto-round computes in float32 on a GPU without bfloat16, and leaves the block in it


def _settings(scheme: LayerScheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "act_bits": 16}
    shape = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
    return shape | {"data_type": "int", "act_bits": 16}


def _hold(original: Any, tuned: Any, scheme: LayerScheme) -> QuantizedLayer:
    """auto-round counts from zero up, compressed-tensors from the middle of the range."""
    device, dtype = original.weight.device, original.weight.dtype
    scale = tuned.scale.to(device, dtype).reshape(original.out_features, -1)
    middle = 2 ** (scheme.bits - 1)
    zero_point = torch.as_tensor(tuned.zp, device=device).expand_as(scale) - middle
    original.weight.data = tuned.weight.data.to(device, dtype)
    return hold(original, scheme, scale, zero_point)
