"""A tiny random model of any type that transformers knows: the defaults of its configuration, every size made small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from qft.checkpoint.language import auto_class
from tests.support.models import byte_tokenizer

TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
WIDTH, HEADS, HEAD, INNER, BLOCKS, EXPERTS, ROOM = 64, 4, 16, 128, 2, 4, 512
SIZES: tuple[tuple[int, str], ...] = (
    (288, "vocab_size vocab_size_per_layer_input unpadded_vocab_size output_vocab_size"),
    (
        WIDTH,
        "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim embedding_dim "
        "attention_hidden_size lru_width out_hidden_size projection_dim input_embedding_size "
        "backbone_hidden_size emb_dim output_embedding_size mamba_d_ssm moe_intermediate_size "
        "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size linear_key_head_dim linear_value_head_dim axial_pos_embds_dim",
    ),
    (
        HEADS,
        "num_attention_heads n_head num_heads n_heads linear_num_value_heads attention_heads "
        "swa_num_attention_heads decoder_attention_heads encoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads index_n_heads mamba_n_heads "
        "mamba_num_heads n_mamba_heads linear_num_heads",
    ),
    (
        HEAD,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim index_head_dim kv_channels "
        "state_size mamba_d_state ssm_state_size hidden_size_per_layer_input laurel_rank rotary_dim "
        "attention_head_dim indexer_head_dim",
    ),
    (32, "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim o_lora_rank adapter_rank"),
    (
        INNER,
        "intermediate_size ffn_dim n_inner d_inner feed_forward_size dff dim_ff encoder_ffn_dim "
        "decoder_ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
        "prefix_dense_intermediate_size mamba_intermediate_size",
    ),
    (
        BLOCKS,
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth "
        "num_encoder_layers num_decoder_layers num_key_value_heads linear_num_key_heads num_kv_heads "
        "num_experts_per_tok moe_topk moe_k top_k_experts swa_num_key_value_heads spatial_merge_size "
        "full_attention_interval temporal_patch_size",
    ),
    (EXPERTS, "time_step_rank num_experts num_local_experts n_routed_experts moe_num_experts"),
    (ROOM, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_sequence_length"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace num_dense_layers mamba_n_groups n_groups mamba_ngroups "
        "num_nextn_predict_layers",
    ),
    (
        64,
        "sliding_window sliding_window_size attention_window_size attention_chunk_size chunk_size "
        "mamba_chunk_size window_size prompt_length image_size_text",
    ),
)
"""Fields of configurations of language models, by what is small."""
TOWER = {"image_size": 28, "patch_size": 14, "num_attention_heads": 2, "num_heads": 2, "hidden_size": 32}
TOWER |= {"intermediate_size": 64, "mlp_dim": 64}
"""What a tower for images has otherwise."""
SMALL = {name: size for size, names in SIZES for name in names.split()}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_HALVED = {"rope_parameters": _SECTIONS["rope_parameters"] | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"]}
OTHERWISE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": _HYBRID,
    "zamba2": _HYBRID | {"n_mamba_heads": 4, "num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 0, "n_output_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2},
    "gemma3n_text": {"intermediate_size": [INNER, INNER], "activation_sparsity_pattern": [0.0, 0.0]},
    "glm5_next_text": {"num_key_value_heads": HEADS},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [WIDTH, WIDTH]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0, 1]},
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), _SECTIONS),
    **dict.fromkeys(("qwen2_5_omni_text", "cosmos3_edge_text", "hy_v4_vl_text", "hunyuan_vl_text"), _SECTIONS),
    "glm4v_moe_text": _HALVED,
}
"""Fields of single types whose sizes hang together in another way."""
MOST = 30_000_000
"""Parameters of what is called tiny."""


def text_types() -> list[str]:
    """Model types that AutoModelForCausalLM loads."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> list[str]:
    """Those that AutoModelForImageTextToText loads."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny_config(kind: str) -> PretrainedConfig:
    """Of a model type. Raises whatever its class does for sizes that do not fit each other."""
    made: PretrainedConfig = CONFIG_MAPPING[kind](**_settings(CONFIG_MAPPING[kind], kind))
    if name := MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind):  # of those that have a language model alone, too
        made.architectures = [name]
    return made


def tiny_model(kind: str) -> Any:
    """In float32, of a seed."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    auto = auto_class(config)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MOST:
        raise ValueError(f"{kind} has {count:,} parameters at the smallest")
    return auto.from_config(config, dtype=torch.float32).eval()


def write_tiny_model(folder: Path, kind: str) -> Path:
    """The model of that type with the byte tokenizer."""
    tiny_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _settings(made: type[PretrainedConfig], kind: str, *, sees: bool = False) -> dict[str, Any]:
    """Arguments of a configuration; `sees`: it is that of a tower."""
    sizes = SMALL | (TOWER if sees else {})
    fields = {field.name: field for field in dataclasses.fields(made)}
    found: dict[str, Any] = {name: sizes[name] for name, field in fields.items() if name in sizes and _is_number(field)}
    if not sees:
        found |= {name: value for name, value in TOKENS.items() if name in fields}
    spare = iter(range(261, 288))  # behind the tokens of the byte tokenizer
    for name, field in fields.items():
        if name.endswith(("_token_id", "_token_index")) and name not in TOKENS and _is_number(field):
            found[name] = next(spare)
    if fields.keys() & {"kv_lora_rank", "qk_rope_head_dim"}:  # latent attention, in which heads share nothing
        found |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in fields else {}
    standard = _standard(made)
    kinds = list(dict.fromkeys(getattr(standard, "layer_types", None) or []))
    if len(kinds) > 1 and "num_hidden_layers" in found and not sees:
        found |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    if "is_decoder" in fields and not sees:
        found["is_decoder"] = True
    for name, own_class in made.sub_configs.items():
        config = getattr(standard, name, None) or ("vision" in name and own_class is not AutoConfig and own_class())
        if isinstance(config, PretrainedConfig):
            words = "text" in name or "llm" in name or "decoder" in name or "thinker" in name
            own = _settings(type(config), config.model_type, sees=not words)
            found[name] = own | {"model_type": config.model_type}
    return found | OTHERWISE.get(kind, {})


def _standard(made: type[PretrainedConfig]) -> PretrainedConfig | None:
    """The configuration of the defaults; None: they do not fit each other."""
    try:
        return made()
    except Exception:  # as many kinds as there are configurations
        return None


def _is_number(field: dataclasses.Field[Any]) -> bool:
    return "int" in str(field.type)


def tiny_skeleton(kind: str, **changes: Any) -> Any:
    """The model of that type without contents, with other fields of its configuration."""
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return auto_class(config).from_config(config)
