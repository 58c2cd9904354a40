"""What quantizing did to each linear layer: error of the weights, noise of the outputs, outliers of the inputs, bytes.

Each layer is measured by itself, on the input that it gets in the reference model, so that the noise of one layer does
not count in those behind it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qft.documents.evaluation import LayerError
from qft.errors import ModelError
from qft.memory.meter import weight_bytes
from qft.quant.delta import add_delta
from qft.quant.dequantize import dequantized_weight, is_quantized
from qft.quant.layer import skip_entry
from qft.quant.rounded import rounded_weight

K = TypeVar("K")
Visit = Callable[["_Pair", torch.Tensor], None]

SNR_LIMIT = 200.0
"""Decibels that stand for an exact output, whose ratio is infinite and has no JSON."""
OUTLIER = 6.0
"""Root mean squares above which a magnitude is an outlier; LLM.int8() (arXiv:2208.07339) looks above 6.0."""
ROUNDING_16_BIT = 2.0**-9
"""Largest relative error of rounding to bfloat16: a layer no worse than this has nothing to gain in 16 bits."""
SLICE = 2**22
"""Values summed at once: bounds the copy that a sum in float64 makes to 32 MiB."""


def layer_errors(
    reference: PreTrainedModel, model: PreTrainedModel | PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]
) -> list[LayerError]:
    """Each linear layer of `reference`, an unquantized model, against the layer of its name in `model`.

    A batch holds input_ids and attention_mask, both int64 [rows, tokens], padded on the right; padding counts nowhere.
    The reference runs over them twice, as outliers are told from the root mean square of the whole input. Adapters
    count as `model` applies them. A layer that no token reaches (an expert without work) is left out. Raises
    ModelError where `model` lacks a layer, or has it in another shape."""
    pairs, names = _pairs(reference, model), ("input_ids", "attention_mask")
    placed = [{name: batch[name].to(reference.device) for name in names} for batch in batches]
    runs = [(partial(reference, **batch, use_cache=False), batch["attention_mask"].bool()) for batch in placed]
    with _evaluating(reference, model), torch.no_grad():
        # compressed-tensors unpacks a loaded model in its first pass, and the layers alone would never see one.
        model(torch.zeros(1, 1, dtype=torch.long, device=_device(model)), use_cache=False)
        return _errors(pairs, runs)


def block_errors(pairs: Mapping[str, tuple[nn.Linear, nn.Module]], run: Callable[[], object]) -> list[LayerError]:
    """Each pair (unquantized layer, the same as it is held) by its name, on the inputs that `run` sends through the
    unquantized ones. It is called twice, and no token of it may be padding."""
    with torch.no_grad():
        return _errors([_Pair(name, *layers) for name, layers in pairs.items()], [(run, None)])


def suggest_skip_modules(
    errors: Sequence[LayerError], weights: Mapping[str, int], *, budget_bytes: int, full_bits: int = 16
) -> list[str]:
    """Layers to keep unquantized for at most `budget_bytes` more memory: entries for quant.skip_modules, worst first.

    The noise of layers adds up, and that of the worst outweighs the others', so the layer whose output has the lowest
    signal-to-noise ratio comes first, the smaller one of two alike; a layer that no longer fits is passed over for the
    next. `weights` tells the number of each layer's weights, which take `full_bits` unquantized. Layers as good as
    their 16-bit rounding have nothing to gain and are not suggested. The errors are those of a model without adapters.
    """
    names, kept, left = [error.name for error in errors], [], budget_bytes
    for error in sorted(errors, key=lambda error: (error.output_snr_db, error.bytes)):
        cost = max(0, weights[error.name] * full_bits // 8 - error.bytes)
        if error.weight_error > ROUNDING_16_BIT and cost <= left:
            kept.append(skip_entry(error.name, names))
            left -= cost
    return kept


@dataclass
class _Pair:
    """One linear layer in both models, and what is summed of it over the batches."""

    name: str
    reference: nn.Linear
    layer: nn.Module
    """As the other model holds it, in peft's wrapper if it has one."""
    signal: float = 0.0
    """Sum of squares of the reference's outputs."""
    noise: float = 0.0
    """Of the outputs' differences."""
    power: float = 0.0
    """Of the inputs."""
    values: int = 0
    """Numbers in the inputs."""
    outliers: int = 0
    """Those among them above OUTLIER times their root mean square."""

    def compare(self, rows: torch.Tensor) -> None:
        """Send the input `rows` [tokens, features] through both layers."""
        # By forward, not by call: neither layer's hooks are to run, least of all the one that this is called from.
        # As one row of a batch: compressed-tensors scales activations for each token of a batch only.
        rows = rows[None]
        expected = self.reference.forward(rows)
        given = self.layer.forward(rows.to(_device(self.layer), _input_dtype(self.layer, rows.dtype)))
        difference = given.to(expected.device, torch.float32) - expected.float()
        self.signal += _sum_of_squares(expected)
        self.noise += _sum_of_squares(difference)
        self.power += _sum_of_squares(rows)
        self.values += rows.numel()

    def count_outliers(self, rows: torch.Tensor) -> None:
        """After all of compare, which tells the root mean square."""
        limit = OUTLIER * math.sqrt(self.power / self.values)
        self.outliers += int((rows.float().abs() > limit).sum())

    def error(self) -> LayerError:
        if not math.isfinite(self.signal + self.noise):
            raise ModelError(f"{self.name}: gives outputs that are not finite, so their error cannot be measured")
        held, original = _weight(self.layer, self.name), _weight(self.reference, self.name)
        block = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return LayerError(
            name=self.name,
            block=int(block[1]) if block else None,
            kind=self.name.rpartition(".")[2],
            weight_error=_relative_error(held.to(original.device), original),
            output_snr_db=min(SNR_LIMIT, max(-SNR_LIMIT, decibels(self.signal, self.noise))),
            outlier_share=self.outliers / self.values,
            # A code book that layers share counts in each.
            bytes=sum(weight_bytes(self.layer).values()),
        )


def _pairs(reference: Any, model: Any) -> list[_Pair]:
    """The linear layers of `reference` beside those of `model`; the output head only if it is linear in both."""
    held = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    head = reference.get_output_embeddings()
    pairs = []
    for name, module in reference.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        linear = _linear(held.get(name))
        if isinstance(linear, nn.Linear):
            expected, found = (f"[{layer.out_features}, {layer.in_features}]" for layer in (module, linear))
            if expected != found:
                text = f"is {found} in the model and {expected} in the reference: not the same architecture"
                raise ModelError(f"{name}: {text}")
            pairs.append(_Pair(name, module, held[name]))
        elif module is not head:
            found = f"has a {type(linear).__name__} there" if linear else "has none"
            raise ModelError(f"{name}: is a linear layer of the reference, and the model compared with it {found}")
    return pairs


def _errors(pairs: list[_Pair], runs: Sequence[tuple[Callable[[], object], torch.Tensor | None]]) -> list[LayerError]:
    """Of what each of `runs` sends through the reference's layers, padding aside, which its mask tells."""

    def look(key: tuple[_Pair, Visit, torch.Tensor | None], inputs: torch.Tensor) -> None:
        pair, visit, mask = key
        rows = inputs.flatten(0, -2) if mask is None else _rows(inputs, mask, pair.name)
        if len(rows):
            visit(pair, rows)

    for visit in (_Pair.compare, _Pair.count_outliers):
        for run, mask in runs:
            with inputs_seen([(pair.reference, (pair, visit, mask)) for pair in pairs], look):
                run()
    return [pair.error() for pair in pairs if pair.values]


@contextmanager
def inputs_seen(layers: Iterable[tuple[nn.Module, K]], look: Callable[[K, torch.Tensor], None]) -> Iterator[None]:
    """Give `look` whatever each of the layers is given, with what stands beside the layer."""

    def hook(key: K) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: look(key, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(key)) for layer, key in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    """[tokens, features] of an input [rows, tokens, features], or [rows * tokens, features], without its padding."""
    rows, real = inputs.flatten(0, -2), mask.flatten().to(inputs.device)
    if real.all():
        return rows
    if inputs.shape[:-1] not in (mask.shape, real.shape):
        raise ModelError(
            f"{name}: gets an input of shape {list(inputs.shape)}, in which the padding of a batch of shape "
            f"{list(mask.shape)} cannot be told: measure on batches without padding (one row each)"
        )
    return rows[real]


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Dropout off, each module's mode back as it was afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _linear(module: nn.Module | None) -> nn.Module | None:
    """The layer within peft's wrapper, without its adapters."""
    if isinstance(module, ModulesToSaveWrapper):
        used = module.active_adapters and not module.disable_adapters
        return _linear(module.modules_to_save[module.active_adapters[0]] if used else module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _input_dtype(layer: nn.Module, given: torch.dtype) -> torch.dtype:
    """What to give a layer. Quantized ones take any dtype, but recast their bias to it, so it is the bias's."""
    linear: Any = _linear(layer)
    decides = linear.bias if is_quantized(linear) else linear.weight
    return given if decides is None else decides.dtype


def _weight(layer: Any, name: str) -> torch.Tensor:
    """The weight that the layer multiplies with, float32 [out, in]: dequantized, active adapters added, and rounded
    where a format is trained for."""
    if (rounded := rounded_weight(layer)) is not None:
        return rounded.float()
    weight = dequantized_weight(_linear(layer)).float()
    if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters and not layer.merged:
        for adapter in layer.active_adapters:
            weight = _with_adapter(layer, adapter, weight, name)
    return weight


def _with_adapter(layer: Any, adapter: str, weight: torch.Tensor, name: str) -> torch.Tensor:
    """W + s B A, scaled with DoRA; as it is where the layer has no such adapter. Raises ModelError for other kinds."""
    if not isinstance(layer, LoraLayer):
        raise ModelError(f"{name}: has an adapter of kind {type(layer).__name__}; only LoRA and DoRA are known here")
    if adapter not in layer.lora_A:
        return weight
    magnitudes = layer.lora_magnitude_vector
    if adapter in layer.lora_variant and adapter not in magnitudes:
        kind = type(layer.lora_variant[adapter]).__name__
        raise ModelError(f"{name}: has an adapter of kind {kind}; only LoRA and DoRA are known here")
    magnitude = magnitudes[adapter].weight if adapter in magnitudes else None
    return add_delta(weight, layer.get_delta_weight(adapter), magnitude)


def _sum_of_squares(values: torch.Tensor) -> float:
    """In float64."""
    parts = torch.split(values.flatten(), SLICE)
    return math.fsum(float(part.double().square().sum()) for part in parts)


def _relative_error(held: torch.Tensor, original: torch.Tensor) -> float:
    """Norm of the difference over the norm of `original`."""
    norm = math.sqrt(_sum_of_squares(original))
    return math.sqrt(_sum_of_squares(held - original)) / max(norm, torch.finfo(torch.float32).tiny)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
