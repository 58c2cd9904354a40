"""How a model's weights are held: in which dtype, by which scheme, and what of them that is."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.checkpoint.bypassed import bypassed_linears, common_ends, deep_linears, initialized_linears
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.language import beside_language
from qft.checkpoint.skeleton import find_blocks
from qft.checkpoint.weights import Weights
from qft.machine.device import Device
from qft.quant.experts import owner
from qft.quant.hold import AsPacked, Scheme, find_scheme
from qft.quant.layer import skip_entry
from qft.quant.rounding import TARGETS
from qft.quant.share import Held, count_weights
from qft.recipe import Recipe
from qft.recipe.calibration import COMPRESSED
from qft.recipe.training import ModelSection, QuantSection


def plain_dtype(section: ModelSection, device: Device, *, whole: bool) -> str:
    """What `auto` stands for; `whole`: the weights themselves are trained."""
    if section.dtype != "auto":
        return section.dtype
    # An update is far smaller than its weight: in 16 bits most of it would be rounded away.
    if whole:
        return "float32"
    return "bfloat16" if device.bf16 else "float16"


def scheme_of(recipe: Recipe, device: Device, checkpoint: Checkpoint, model: PreTrainedModel) -> Scheme:
    """How the model is held. Weights that are rounded in training are rounded in the dtype in which they will be
    evaluated and exported, and within the blocks alone: what quantizes for an export goes block by block."""
    dtype = plain_dtype(recipe.model, device, whole=recipe.adapter.kind == "none")
    heads = (*output_heads(model), *_kept_whole(model, recipe.quant))
    if recipe.quant.mode == "qat" and not checkpoint.quantization:
        dtype = plain_dtype(recipe.model, device, whole=False)
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        blocks = find_blocks(model, model.config.get_text_config().num_hidden_layers)[0]
        around = [name for name in linears if not name.startswith(f"{blocks}.") and name not in heads]
        heads = (*heads, *(skip_entry(name, linears) for name in around))
    packed = _packed(checkpoint, model) if checkpoint.packed and checkpoint.quantization else None
    return find_scheme(recipe.quant, checkpoint.quantization, dtype, heads, packed)


def _packed(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[frozenset[str], float]:
    """Weights of the model that can stay as the files hold them, by name, and how many bits one takes. Reads headers,
    for which the files of a hub model are fetched."""
    sizes = Weights(checkpoint.with_weights(), model).packed_sizes()
    held = sum(model.state_dict(keep_vars=True)[name].numel() for name in sizes)
    return frozenset(sizes), 8 * sum(sizes.values()) / max(held, 1)


def _kept_whole(model: PreTrainedModel, quant: QuantSection) -> list[str]:
    """What is never held in few bits, as transformers matches it: what sees, which would lose precision for which
    nothing that is learnt from text makes up, layers whose weights other code reads, and those that the mode cannot."""
    kept = {*bypassed_linears(model), *(deep_linears(model) if quant.mode == "8bit" else ())}
    if quant.target and TARGETS[quant.target].form == COMPRESSED:
        kept |= {*initialized_linears(model)}
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    left, others = ([name for name in linears if (name in kept) is is_kept] for is_kept in (True, False))
    return [*beside_language(model), *common_ends(left, others)]


def weights_held(scheme: Scheme, recipe: Recipe, model: PreTrainedModel) -> Held | None:
    """What of the weights of a skeleton the scheme holds in few bits; None: only other code knows."""
    layers, asked = scheme.holds(model), (*recipe.quant.named_skips, *beside_language(model))
    if layers is None:
        return None
    layers |= {owner(name) for name in scheme.holds_experts(model)}
    own = isinstance(scheme, AsPacked)  # of which whoever made the files has left the others
    return Held.of(count_weights(model), layers, lambda name: own or not should_convert_module(name, list(asked)))


def output_heads(model: PreTrainedModel) -> tuple[str, ...]:
    head = model.get_output_embeddings()
    return tuple(name for name, module in model.named_modules() if module is head)
