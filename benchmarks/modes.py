"""Speed and memory of each way to hold the base, and of plain transformers + peft beside it, on random weights.

    python benchmarks/modes.py                                        a small Llama, whatever device there is
    python benchmarks/modes.py --size 1b --batch 8 --length 2048      a Llama of 1.5 billion parameters
    python benchmarks/modes.py --size 8b --batch 4 --checkpointing

Every arm runs in a process of its own, with LoRA r=16 on all linear layers and rows that fill `--length` tokens. The
arm `plain` is the same nf4 training by the Trainer without qft; `ratio` is each arm's tokens/s over its.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quant": {"preset": "finetune"}},
    "fp4": {"quant": {"mode": "4bit", "quant_type": "fp4", "compute_dtype": "bfloat16", "double_quant": True}},
    "8bit": {"quant": {"mode": "8bit"}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "fp32": {"model": {"dtype": "float32"}},
    **{f"qat-{name}": {"quant": {"mode": "qat", "target": name}} for name in ("int4-g32", "nf4", "w8a8")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2, help="rows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--whole-loss", action="store_true", help="train.chunked_loss: false")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(Path(options.plain), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options)
        results = {arm: run_arm(arm, Path(folder), options) for arm in options.arms}
    base = results.get("plain", {}).get("tokens_per_second")
    for arm, result in results.items():
        ratio = result["tokens_per_second"] / base if base and "tokens_per_second" in result else None
        print(json.dumps({"arm": arm, **result, "ratio": ratio and round(ratio, 2)}))


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A random model, if there is none, a tokenizer of one token a byte, and rows of exactly `length` tokens."""
    from transformers import LlamaConfig

    make_rows(folder / "rows.jsonl", options.batch * options.steps, options.length)
    if (folder / "model" / "config.json").exists():
        return
    make_tokenizer(folder / "model")
    config = LlamaConfig(
        vocab_size=2048 if options.size == "small" else 128256,
        num_key_value_heads=8,
        max_position_embeddings=max(options.length, 2048),
        tie_word_embeddings=options.size == "small",
        bos_token_id=0,
        eos_token_id=0,
        **SIZES[options.size],
    )
    make_weights(folder / "model", config)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def make_weights(folder: Path, config: Any) -> None:
    """Random ones in bfloat16, one file a block: the model is never whole in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from qft.checkpoint.weights import write_index

    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(block, {})[name] = parameter
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for block, parameters in files.items():
        tensors = {}
        for name, p in parameters.items():
            value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
            tensors[name] = value.cpu() if p.ndim > 1 else torch.ones(p.shape, dtype=p.dtype)
        save_file(tensors, folder / f"block-{block}.safetensors", metadata={"format": "pt"})
    write_index(folder)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)


def make_rows(path: Path, count: int, length: int) -> None:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": "a" + "".join(draw.choices(letters, k=length - 2))}) + "\n")


def recipe(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": options.length},
        "train": {
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "gradient_accumulation_steps": 1,
            "optim": "adamw_8bit",
            "gradient_checkpointing": options.checkpointing,
            "chunked_loss": False if getattr(options, "whole_loss", False) else "auto",
            "save_strategy": "no",
            "report_to": [],
        },
        "output_dir": str(folder / arm),
    }
    for section, values in ARMS[arm].items():
        made.setdefault(section, {}).update(values)
    return made


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    if arm == "plain":
        command = [sys.executable, __file__, *sys.argv[1:], "--plain", str(folder)]
    else:
        path = folder / f"{arm}.yaml"
        path.write_text(json.dumps(recipe(arm, folder, options)))
        command = [sys.executable, "-m", "qft", "train", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr.strip().splitlines()[-1:]}
    result = json.loads(done.stdout.splitlines()[-1] if arm == "plain" else done.stdout)
    if arm != "plain":
        result = {
            "tokens_per_second": result["throughput"]["tokens_per_second"],
            "step_seconds": result["throughput"]["step_seconds_p50"],
            "peak_gpu_gib": result["memory"]["peak_gpu_bytes"] / 2**30,
            "phases": {name: round(share, 3) for name, share in result["phases"].items()},
            "loss": result["loss"]["last"],
        }
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
    return rounded | {"process_seconds": round(time.perf_counter() - started, 1)}


def plain(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one would write without qft."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        in_4_bits(folder),
        use_gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return timed(get_peft_model(model, lora), folder, options)


def four_bits() -> Any:
    """nf4 with double quantization, as transformers is told of it."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def in_4_bits(folder: Path) -> Any:
    """FOLDER/model in nf4, quantized while it is loaded unless its files are."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized = "quantization_config" in json.loads((folder / "model" / "config.json").read_text())
    told = {} if quantized else {"quantization_config": four_bits()}
    device: Any = 0 if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, device_map={"": device}, **told)


def token_ids(folder: Path) -> list[list[int]]:
    """FOLDER/rows.jsonl as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [[*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id] for line in lines]


def clock(times: list[float], warm: int) -> Any:
    """A Trainer's callback that notes the time behind each step, and forgets the peak of memory behind step `warm`."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if state.global_step == warm:
                    torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())

    return Clock()


def timed(model: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The training of a model with its adapters by the plain Trainer."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    on_gpu, ids, times = torch.cuda.is_available(), token_ids(folder), list[float]()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": ids})
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        optim="adamw_8bit",
        learning_rate=2e-4,
        bf16=True,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock(times, 1)])
    loss = trainer.train().training_loss
    seconds = sorted(b - a for a, b in pairwise(times))
    return {
        "tokens_per_second": options.batch * options.length * len(seconds) / sum(seconds),
        "step_seconds": seconds[len(seconds) // 2],
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "loss": loss,
    }


if __name__ == "__main__":
    main()
