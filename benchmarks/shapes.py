"""Random models of known shapes whose files are in nf4 from the start: an 8B takes seconds, and its 16 bits no room."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import modes

LLAMA = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 128256}
SHAPES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "tiny": ("Llama", 2, 256, modes.SIZES["small"] | {"vocab_size": 2048, "num_key_value_heads": 8}),
    "1.5b": ("Llama", 8, 2048, modes.SIZES["1b"] | LLAMA),
    "8b": ("Llama", 4, 2048, modes.SIZES["8b"] | LLAMA),
    # Biased products, a vocabulary of 152k
    "qwen": ("Qwen2", 8, 2048, {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "tie_word_embeddings": True}),
    # A vocabulary of 256k, soft caps, norms behind attention and MLP
    "gemma": ("Gemma2", 4, 2048, {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
              "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}),
    # Layer norms with a bias, MLPs without a gate, q, k and v in one
    "neox": ("GPTNeoX", 4, 2048, {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192,
             "num_hidden_layers": 24, "num_attention_heads": 16, "rotary_pct": 0.25}),
    "phi": ("Phi", 4, 2048, {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 24, "num_attention_heads": 32, "partial_rotary_factor": 0.5}),
    "mixture": ("Mixtral", 4, 2048, {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584,
                "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 8}),
}  # fmt: skip
"""Family, rows, tokens of a row, and what the family's config is told."""


def place() -> str | None:
    """A folder in memory if there is one with room, else where temporary files are."""
    shared = Path("/dev/shm")  # noqa: S108
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 2**35 else tempfile.gettempdir()


def make_model(folder: Path, shape: str) -> None:
    """A model of that shape with a tokenizer of one token a byte. Linear layers are in nf4, its scales in 8 bits; what
    else has several dimensions is in bfloat16."""
    import torch
    import transformers
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from torch import nn
    from transformers import AutoModelForCausalLM

    from qft.checkpoint.weights import write_index

    family, _, length, values = SHAPES[shape]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config: Any = getattr(transformers, f"{family}Config")(**{"max_position_embeddings": length} | ids | values)
    modes.make_tokenizer(folder)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        tensors: dict[str, torch.Tensor] = {}
        for kind, p in module.named_parameters(name, recurse=False):
            value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
            if p.ndim == 1:
                value = value + (0.0 if kind.endswith("bias") or family == "Gemma2" else 1.0)
            elif isinstance(module, nn.Linear) and module is not head:
                value, state = quantize_4bit(value, quant_type="nf4", compress_statistics=True)
                tensors |= {f"{kind}.{key}": part for key, part in state.as_dict(packed=True).items()}
            tensors[kind] = value
        if tensors and not (module is head and config.tie_word_embeddings):
            told = {key: value.cpu() for key, value in tensors.items()}
            save_file(told, folder / f"{name}.safetensors", metadata={"format": "pt"})
    write_index(folder)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.quantization_config = modes.four_bits().to_dict()
    config.save_pretrained(folder)
