"""What a GGUF file says of its model beyond what transformers (5.24) reads of it. Left at a default, it would be
another model, without a word: it is put into the configuration, or the file is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as gguf_utils
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from qft.checkpoint.header import header
from qft.checkpoint.quick_gguf import quick_gguf
from qft.checkpoint.rotary import llama3_factors
from qft.errors import ModelError

FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "context_length": "max_position_embeddings",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Ends of a file's keys, and what they are in a configuration."""
OWN_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", "gpt-oss": "gpt_oss"}
"""What transformers calls architectures."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Blocks of the 27B models, whose queries alone are not scaled by the size of a head (llama.cpp, gemma2.cpp and
gemma3.cpp)."""
FREQUENCIES, LONG = "rope_freqs.weight", "rope_factors_long.weight"
SETTINGS = (FREQUENCIES,)
"""Tensors that are no weights."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every model that was released with such scaling."""
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """In which transformers says that it reads no files of that architecture: raises ModelError."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if "not supported" not in str(error) and "Unknown gguf" not in str(error):
            raise
        kind = header(path).values.get("general.architecture")
        text = f"transformers {transformers.__version__} reads no GGUF files of {kind}: a newer one may; or name the "
        text += "folder of its safetensors, or the hub's model, in model.path"
        raise ModelError(f"{path}: {text}") from error


def complete(config: PretrainedConfig, path: Path) -> None:
    """Put into `config`, which transformers made of the file at `path`, what that left at a default. Raises ModelError
    for what a configuration cannot say."""
    found = header(path)
    kind = str(found.values.get("general.architecture"))
    said = {key.removeprefix(f"{kind}."): value for key, value in found.values.items() if key.startswith(f"{kind}.")}
    read = {key for key, name in GGUF_CONFIG_MAPPING.get(OWN_NAMES.get(kind, kind), {}).items() if name}
    for key, name in FIELDS.items():
        if key in said and key not in read:
            _set(config, name, said[key], f"{path}: {kind}.{key}")
    if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:  # its class's own, and the file says none
        config.pad_token_id = None
    if kind in LARGEST:
        heads, width = config.num_attention_heads, config.hidden_size
        config.query_pre_attn_scalar = width // heads if config.num_hidden_layers == LARGEST[kind] else config.head_dim
    if LONG in found.shapes:
        raise ModelError(f"{path}: its rotary embedding is of two lengths ({LONG}), which is not read of GGUF files")
    rope = getattr(config, "rope_parameters", None)
    if rope:
        rope = rope.get("full_attention", rope)
        rope.update(_rope(said, config, rope, path))
        if FREQUENCIES in found.shapes:
            rope.update(_slowed(path, config))


def _set(config: PretrainedConfig, name: str, value: Any, where: str) -> None:
    if hasattr(config, name):
        setattr(config, name, value)
    elif name == "head_dim" and value != _head_dim(config):
        raise ModelError(f"{where} is {value}, and a {config.model_type} has heads of {_head_dim(config)} numbers")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(said: Mapping[str, Any], config: Any, rope: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """What the file says of the rotary embedding, as transformers has it."""
    if "rope.freq_base" in said:
        yield "rope_theta", said["rope.freq_base"]
    turned = said.get("rope.dimension_count")
    if turned and turned != round(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)):
        yield "partial_rotary_factor", turned / _head_dim(config)
    factor, scaling = said.get("rope.scaling.factor", 1.0), said.get("rope.scaling.type", "linear")
    if scaling == "none" or factor in (0, 1):
        return
    if scaling not in ("linear", "yarn"):
        raise ModelError(f"{path}: rope.scaling.type {scaling}: linear and yarn are read of GGUF files")
    yield "rope_type", scaling
    yield "factor", factor
    if scaling == "yarn":
        yield "original_max_position_embeddings", said.get("rope.scaling.original_context_length")
        yield from ((name, said[f"rope.scaling.{key}"]) for key, name in YARN.items() if f"rope.scaling.{key}" in said)


def _slowed(path: Path, config: Any) -> dict[str, Any]:
    """Llama 3.1's scaling of which the file holds the factors. Raises ModelError if those are of none that is known."""
    import gguf  # an extra

    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == FREQUENCIES)
    rope = {"rope_type": "llama3", "factor": float(np.max(tensor.data)), **LLAMA3}
    theta = config.rope_parameters["rope_theta"]
    if not np.allclose(llama3_factors(rope | {"rope_theta": theta}, _head_dim(config)), tensor.data, rtol=1e-3):
        raise ModelError(f"{path}: {FREQUENCIES} slows frequencies by none of the rules that are known")
    return rope


def unread_tensors(path: Path, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Of the file at `path`, tensors that `model` would not get, and weights of the model, which is without contents,
    that none of them is."""
    found = header(path)
    kind = str(found.values.get("general.architecture"))
    processor = gguf_utils.TENSOR_PROCESSORS.get(kind, gguf_utils.TensorProcessor)(config=model.config.to_dict())
    with quick_gguf(), readable(path):
        known: dict[str, str] = gguf_utils.get_gguf_hf_weights_map(model, processor)
    # Stacks of experts are known by the names of their layers.
    own = {name: known.get(name) or known.get(name.removesuffix(".weight")) for name in found.shapes}
    read = {*own.values()}
    missing = [name for name, _ in model.named_parameters() if processor.preprocess_name(name) not in read]
    return [name for name, weight in own.items() if weight is None and name not in SETTINGS], missing
