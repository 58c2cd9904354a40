"""What a GGUF file says of a model's shape: architecture, sizes and rotary embedding, with the order of its rows."""

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qft.checkpoint.rotary import llama3_factors
from qft.errors import ModelError

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
"""Class of the model -> architecture of the file. llama.cpp runs Mistral as llama."""

YARN_KNOWN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
"""What llama.cpp assumes where the file says nothing."""


def architecture(config: Any) -> gguf.MODEL_ARCH:
    """The file's architecture. Raises ModelError for a model that its llama.cpp counterpart would compute otherwise."""
    name = (getattr(config, "architectures", None) or ["(none named)"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"GGUF: cannot write {name}; supported are {', '.join(ARCHITECTURES)}")
    if config.hidden_act != "silu":
        raise ModelError(f"GGUF: hidden_act {config.hidden_act!r}: llama.cpp computes {name} with silu alone")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ModelError(f"GGUF: sliding_window {config.sliding_window}: llama.cpp gives {name} full attention")
    return ARCHITECTURES[name]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_shape(writer: Any, config: Any) -> None:
    """Write the hyperparameters (source: the GGUF specification, docs/gguf.md of ggml-org/ggml). Raises ModelError for
    a rotary scaling that the file cannot express."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("GGUF: partial_rotary_factor: only models whose whole head is rotated can be written")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in {"default", "llama3"}:  # llama3's factors travel as a tensor
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    elif kind == "yarn":
        for name, value in rope.items():
            if name not in YARN_KNOWN and value is not None and YARN_DEFAULTS.get(name) != value:
                raise ModelError(f"GGUF: yarn with {name} {value}: the file can say factor and original length alone")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    else:
        raise ModelError(f"GGUF: rope_type {kind!r}: supported are default, linear, llama3 and yarn")
    writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """What llama.cpp divides each frequency by, float32 [head_dim / 2]; None unless the rotary scaling is llama3's."""
    rope = config.rope_parameters
    return llama3_factors(rope, head_dim(config)) if rope.get("rope_type") == "llama3" else None


def heads_to_interleave(name: str, config: Any, arch: gguf.MODEL_ARCH) -> int:
    """Heads of a projection whose rows are to be reordered, 0 for none."""
    if arch != gguf.MODEL_ARCH.LLAMA:
        return 0
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows [heads * head_dim, ...] of q or k so that each rotated pair lies side by side. Hugging Face's
    Llama rotates row i of a head with row i + head_dim / 2; llama.cpp's rotates rows 2i and 2i + 1."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def deinterleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What `interleave` was given."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)
