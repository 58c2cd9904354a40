"""A mixture of experts in 4 bits beside plain transformers + peft, which holds its experts in 16: random weights, LoRA
r=16 on attention and experts, the loss of rows that fill `--length` tokens.

    python benchmarks/experts.py               16 experts, 2.7 billion parameters, on a GPU
    python benchmarks/experts.py --size small  on whatever device there is

Every arm runs in a process of its own. `beside` is the adapter of qft on experts in 16 bits; `ratio` is tokens/s over
those of `plain`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import modes

SIZES = {
    "small": {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512},
    "3b": {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 32000},
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quant": {"preset": "finetune"}},
    "8bit": {"quant": {"mode": "8bit"}},
    "beside": {"model": {"dtype": "bfloat16"}},
}

PLAIN = {"tokens_per_second": "tokens_per_second", "peak_gib": "peak_gpu_gib", "loss": "loss"}
"""What is told of plain training, by what modes.py calls it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.checkpointing = True
    if options.plain:
        print(json.dumps(plain(Path(options.plain), options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options)
        base = None
        for arm in options.arms:
            result = run_arm(arm, folder, options)
            base = result.get("tokens_per_second") if arm == "plain" else base
            ratio = result["tokens_per_second"] / base if base and "tokens_per_second" in result else None
            print(json.dumps({"arm": arm, **result, "ratio": ratio and round(ratio, 2)}), flush=True)


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    from transformers import Qwen3MoeConfig

    modes.make_rows(folder / "rows.jsonl", options.batch * options.steps, options.length)
    modes.make_tokenizer(folder / "model")
    config = Qwen3MoeConfig(
        **SIZES[options.size],
        num_experts=16,
        num_experts_per_tok=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=SIZES[options.size]["hidden_size"] // 16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    modes.make_weights(folder / "model", config)


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    if arm == "plain":
        command = [sys.executable, __file__, *sys.argv[1:], "--plain", str(folder)]
    else:
        made = modes.recipe("plain", folder, options) | {"output_dir": str(folder / arm)}
        for section, values in ARMS[arm].items():
            made[section] = made.get(section, {}) | values
        made["adapter"] = {"target_experts": True}
        path = folder / f"{arm}.yaml"
        path.write_text(json.dumps(made))
        command = [sys.executable, "-m", "qft", "train", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr.strip().splitlines()[-3:]}
    result = json.loads(done.stdout.splitlines()[-1] if arm == "plain" else done.stdout)
    if arm != "plain":
        memory = result["memory"]
        result = {
            "tokens_per_second": result["throughput"]["tokens_per_second"],
            "peak_gib": memory["peak_gpu_bytes"] / 2**30,
            "predicted_gib": (memory["predicted_peak_bytes"] or 0) / 2**30,
            "load_gib": (memory["phases"]["load"]["gpu_allocated_bytes"] or 0) / 2**30,
            "held_gib": memory["after_load_bytes"] / 2**30,
            "quantized_share": result["model"]["quantized_share"],
            "loss": result["loss"]["last"],
        }
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
    return rounded | {"process_seconds": round(time.perf_counter() - started, 1)}


def plain(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one would write without qft."""
    from peft import LoraConfig, get_peft_model

    model = modes.in_4_bits(folder)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    found = modes.timed(get_peft_model(model, lora), folder, options)
    return {name: found[own] for name, own in PLAIN.items()}


if __name__ == "__main__":
    main()
