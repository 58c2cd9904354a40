"""Model families side by side: what kernels take over, how near the losses stay, how fast it is, and its memory.

    python benchmarks/families.py                        every family: some 15 minutes on one GPU
    python benchmarks/families.py Cohere Nemotron --arms plain fused --steps 30 --repeats 3

Random models of four blocks, 2,048 columns and 32,000 words, in nf4 with LoRA r=16 on all linear layers, trained for a
few steps of 4 x 2,048 tokens. Arms: plain (train.kernels plain, all logits at once), fused, float8 (fused, with
train.matmul fp8), checkpointed (fused, and all blocks computed again). The arms take turns, and each training is a JSON
line: tokens/s of the median step and of the fastest, their ratios to plain (the fastest of all repeats so far: of steps
that take a GPU 27 ms, the others tell of the host), the largest difference of a step's loss to plain's, GiB measured
and predicted, what is fused, and what is not. On a CPU the models are tiny, which shows whether they train.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import modes
from shapes import place

STEPS, WARM = 10, 4
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"kernels": "plain", "chunked_loss": False},
    "fused": {},
    "float8": {"matmul": "fp8"},
    "checkpointed": {"gradient_checkpointing": True},
}


def families(hidden: int, layers: int, inner: int, heads: int, words: int, tokens: int) -> dict[str, dict[str, Any]]:
    """By name: the type of its configuration, and what it is told."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": words}
    plain = ids | {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
                   "max_position_embeddings": tokens, "tie_word_embeddings": False}  # fmt: skip
    grouped = plain | {"intermediate_size": inner, "num_key_value_heads": heads // 4}
    size, window = hidden // heads, tokens // 4
    sized = grouped | {"head_dim": size}
    few = {"intermediate_size": inner // 4, "num_experts_per_tok": 2}
    experts = {"moe_intermediate_size": inner // 4, "num_experts": 8, "num_experts_per_tok": 2}
    own = ids | {"n_layer": layers, "n_head": heads}
    latent = {"q_lora_rank": hidden // 4, "kv_lora_rank": hidden // 8, "qk_rope_head_dim": size // 2,
              "qk_nope_head_dim": size // 2, "v_head_dim": size}  # fmt: skip
    return {
        "Llama": {"model_type": "llama", **grouped},
        "Llama-biases": {"model_type": "llama", **grouped, "attention_bias": True, "mlp_bias": True},
        "Arcee": {"model_type": "arcee", **grouped},
        "Bloom": {"model_type": "bloom", **own, "hidden_size": hidden},
        "Cohere": {"model_type": "cohere", **grouped, "logit_scale": 0.25},
        "Cohere2": {"model_type": "cohere2", **grouped, "sliding_window": window},
        "DeepseekV3": {"model_type": "deepseek_v3", **grouped, **latent, "num_key_value_heads": heads,
                       "moe_intermediate_size": inner // 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
                       "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        "Exaone4": {"model_type": "exaone4", **grouped, "sliding_window": window, "sliding_window_pattern": 2},
        "Falcon": {"model_type": "falcon", **plain, "new_decoder_architecture": True, "num_kv_heads": heads // 4},
        "GPT2": {"model_type": "gpt2", **own, "n_embd": hidden, "n_positions": tokens, "resid_pdrop": 0.0,
                 "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "GPTJ": {"model_type": "gptj", **own, "n_embd": hidden, "n_positions": tokens, "rotary_dim": size // 2},
        "GPTNeoX": {"model_type": "gpt_neox", **plain, "intermediate_size": inner},
        "Gemma": {"model_type": "gemma", **sized},
        "Gemma2": {"model_type": "gemma2", **sized, "sliding_window": window},
        "Gemma3": {"model_type": "gemma3_text", **sized, "sliding_window": window},
        "Glm": {"model_type": "glm", **sized},
        "Glm4": {"model_type": "glm4", **sized},
        "GptOss": {"model_type": "gpt_oss", **sized, **few, "num_local_experts": 4},
        "Granite": {"model_type": "granite", **grouped, "embedding_multiplier": 4.0, "logits_scaling": 8.0,
                    "residual_multiplier": 0.22, "attention_multiplier": 1 / size},
        "GraniteMoe": {"model_type": "granitemoe", **grouped, **few, "num_local_experts": 4},
        "Helium": {"model_type": "helium", **sized},
        "HunYuan": {"model_type": "hunyuan_v1_dense", **sized},
        "Lfm2": {"model_type": "lfm2", **grouped, "block_dim": hidden, "conv_dim": hidden, "conv_dim_out": hidden},
        "Mistral-window": {"model_type": "mistral", **sized, "sliding_window": window},
        "Mixtral": {"model_type": "mixtral", **grouped, **few, "num_local_experts": 8},
        "Mpt": {"model_type": "mpt", **ids, "d_model": hidden, "n_layers": layers, "n_heads": heads,
                "max_seq_len": tokens},
        "Nemotron": {"model_type": "nemotron", **grouped},
        "OPT": {"model_type": "opt", **plain, "ffn_dim": inner, "dropout": 0.0, "word_embed_proj_dim": hidden},
        "Olmo": {"model_type": "olmo", **grouped},
        "Olmo2": {"model_type": "olmo2", **grouped},
        "Olmoe": {"model_type": "olmoe", **grouped, **few, "num_experts": 8},
        "Persimmon": {"model_type": "persimmon", **plain, "intermediate_size": inner},
        "Phi": {"model_type": "phi", **plain, "intermediate_size": inner},
        "Phi3": {"model_type": "phi3", **grouped},
        "Qwen2-window": {"model_type": "qwen2", **grouped, "use_sliding_window": True, "sliding_window": window,
                          "max_window_layers": 1},
        "Qwen2Moe": {"model_type": "qwen2_moe", **grouped, **experts, "shared_expert_intermediate_size": inner // 2},
        "Qwen3": {"model_type": "qwen3", **sized},
        "Qwen3Moe": {"model_type": "qwen3_moe", **sized, **experts},
        "SeedOss": {"model_type": "seed_oss", **sized},
        "SmolLM3": {"model_type": "smollm3", **grouped},
        "StableLm": {"model_type": "stablelm", **grouped},
        "Starcoder2": {"model_type": "starcoder2", **grouped, "use_bias": True},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; without any, all")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "fused", "float8"])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of which the first {WARM} are not counted")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    import torch

    from qft.machine.environment import prepare_libraries

    prepare_libraries()
    on_gpu = torch.cuda.is_available()
    known = families(2048, 4, 5632, 16, 32_000, 2048) if on_gpu else families(64, 2, 128, 4, 300, 64)
    if unknown := set(options.names) - known.keys():
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows, length = (4, 2048) if on_gpu else (2, 64)
    asked = argparse.Namespace(batch=rows, length=length, steps=options.steps, checkpointing=False)
    for name in options.names or known:
        with tempfile.TemporaryDirectory(dir=place()) as folder:
            try:
                make(Path(folder), known[name], asked)
            except Exception as error:  # of a transformers version that does not have it
                print(json.dumps({"family": name, "not made": f"{type(error).__name__}: {error}"[:200]}), flush=True)
                continue
            plain: dict[str, Any] = {}
            fastest: dict[str, int] = {}
            for arm in options.arms * options.repeats:
                result = trained(Path(folder), arm, asked)
                plain = result if arm == "plain" else plain
                fastest[arm] = max(fastest.get(arm, 0), result.get("fastest", 0))
                print(json.dumps({"family": name, "arm": arm, **told(result, plain, arm, fastest)}), flush=True)
                gc.collect()


def make(folder: Path, config: dict[str, Any], asked: argparse.Namespace) -> None:
    """A random model whose norms and biases are those of one that was trained, and rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "model")
    modes.make_tokenizer(folder / "model")
    modes.make_rows(folder / "rows.jsonl", asked.batch * asked.steps, asked.length)


def trained(folder: Path, arm: str, asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    from qft.commands.train import train
    from qft.errors import QftError
    from qft.progress import View
    from qft.recipe.load import from_values

    values = modes.recipe("nf4", folder, asked)
    values["quant"]["allow_partial"] = True  # with what of experts, or of other modules, stays in 16 bits
    for of_the_others in ("optim", "chunked_loss"):
        values["train"].pop(of_the_others)
    values["train"] |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
                        "train_sampling_strategy": "sequential"} | ARMS[arm]  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    try:
        report = train(from_values(values), View(), overwrite=True)
    except QftError as error:
        return {"refused": str(error)[:300]}
    rates = [rate for step, rate in report.throughput.history if step > WARM]
    peak = report.memory.phases["train"].gpu_allocated_bytes
    return {
        "tokens_per_second": round(median(rates)),
        "fastest": round(max(rates)),
        "losses": [row[1] for row in report.loss.history],
        "gib": peak and round((peak - before) / 2**30, 2),
        "predicted_gib": round((report.memory.predicted_peak_bytes or 0) / 2**30, 2),
        "fused": report.kernels.fused if report.kernels else {},
        "plain": report.kernels.plain if report.kernels else {},
        "fused_loss": bool(report.settings and report.settings.fused_loss),
    }


def told(result: dict[str, Any], plain: dict[str, Any], arm: str, fastest: dict[str, int]) -> dict[str, Any]:
    """With its last loss alone, and what it is to plain, if that was trained before."""
    if "losses" not in result:
        return result
    said = {name: value for name, value in result.items() if name != "losses"} | {"loss": result["losses"][-1]}
    if "losses" in plain and arm != "plain":
        pairs = zip(result["losses"], plain["losses"], strict=True)
        said["ratio"] = round(result["tokens_per_second"] / plain["tokens_per_second"], 2)
        said["ratio_of_fastest"] = round(fastest[arm] / fastest["plain"], 2)
        said["loss_differs_by"] = round(max(abs(a - b) for a, b in pairs), 4)
    return said


if __name__ == "__main__":
    main()
