"""Peak GPU memory of real trainings of random models, beside what qft predicts of them.

    python benchmarks/memory.py                 every setting: some five minutes on one GPU
    python benchmarks/memory.py llama 8bit      those whose names hold all of these words
    python benchmarks/memory.py --at-once 4     on a large GPU with many cores

A setting is MODEL/MODE/ROWSxTOKENS, with `kept` (no gradient checkpointing) or `ragged` (rows of other lengths beside
the longest, so that batches are padded). Prints a JSON line each: bytes measured by torch.cuda.max_memory_allocated
while training, bytes predicted before anything was loaded, and the error of the prediction.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

COMMON = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "llama-2048x8": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-4096x4": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-2048x32": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
                      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-4096x32": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen2-1536x14": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
                      "num_hidden_layers": 14, "num_attention_heads": 12, "num_key_value_heads": 2,
                      "tie_word_embeddings": True},
    "gemma2-2304x6": {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
                      "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                      "sliding_window": 4096},
    "gemma3-1152x12": {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
                       "intermediate_size": 6912, "num_hidden_layers": 12, "num_attention_heads": 4,
                       "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
    "mixtral-1024x6": {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584,
                       "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
                       "num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
SETTINGS = [
    "llama-2048x8/nf4/1x512", "llama-2048x8/nf4/8x512", "llama-2048x8/nf4/16x512/kept", "llama-2048x8/nf4/4x2048",
    "llama-2048x8/nf4/4x2048/kept", "llama-2048x8/nf4/4x2048/ragged", "llama-2048x8/nf4/4x2048/ragged/kept",
    "llama-2048x8/nf4/1x8192", "llama-2048x8/nf4/2x8192/kept", "llama-2048x8/8bit/4x2048",
    "llama-2048x8/8bit/4x2048/kept", "llama-2048x8/bf16/4x2048", "llama-2048x8/bf16/4x2048/kept",
    "llama-2048x8/fp4/2x4096", "llama-4096x4/nf4/1x512", "llama-4096x4/nf4/2x4096", "llama-4096x4/nf4/4x2048/kept",
    "llama-4096x4/8bit/2x2048/kept", "llama-4096x4/bf16/1x8192", "llama-4096x4/bf16/16x512/kept",
    "llama-2048x32/nf4/8x2048", "llama-2048x32/nf4/2x2048/kept", "llama-4096x32/nf4/4x2048",
    "qwen2-1536x14/nf4/4x2048", "qwen2-1536x14/nf4/4x2048/kept", "qwen2-1536x14/8bit/2x4096",
    "qwen2-1536x14/bf16/8x1024/ragged/kept", "gemma2-2304x6/nf4/1x4096", "gemma2-2304x6/nf4/2x2048/kept",
    "gemma2-2304x6/bf16/4x512", "gemma3-1152x12/nf4/2x2048", "gemma3-1152x12/nf4/2x2048/kept",
    "gemma3-1152x12/8bit/4x1024", "gemma3-1152x12/nf4/4x1024/ragged", "mixtral-1024x6/nf4/4x2048",
    "mixtral-1024x6/nf4/2x2048/kept", "mixtral-1024x6/bf16/4x512/ragged", "llama-2048x8/full/2x1024",
    "llama-2048x8/full/2x1024/kept", "llama-2048x8/qat-nf4/4x2048", "llama-2048x8/qat-nf4/2x2048/kept",
    "llama-2048x8/qat-int4-g32/4x2048", "llama-2048x8/qat-int4-g32/2x2048/kept", "llama-2048x8/qat-q8_0/4x2048",
    "llama-2048x8/qat-mxfp4/2x2048/kept", "llama-2048x8/qat-nvfp4/4x2048", "llama-2048x8/qat-learnt/4x2048",
    "llama-2048x8/qat-distill/4x2048", "llama-2048x8/qat-distill/2x2048/kept",
    "llama-2048x8/qat-nf4-full/2x1024", "llama-2048x8/qat-int4-g32-full/2x1024/kept",
]  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "nf4": {"quant": {"mode": "4bit", "compute_dtype": "bfloat16"}},
    "fp4": {"quant": {"mode": "4bit", "quant_type": "fp4", "double_quant": False, "compute_dtype": "bfloat16"}},
    "8bit": {"quant": {"mode": "8bit"}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "full": {"adapter": {"kind": "none"}},
    **{f"qat-{target}": {"quant": {"mode": "qat", "target": target}}
       for target in ("nf4", "int4-g32", "q8_0", "mxfp4", "nvfp4")},
    **{f"qat-{target}-full": {"quant": {"mode": "qat", "target": target}, "adapter": {"kind": "none"}}
       for target in ("nf4", "int4-g32")},
    "qat-distill": {"quant": {"mode": "qat", "target": "int4-g32", "distill": True}},
    "qat-learnt": {"quant": {"mode": "qat", "target": "w8a8-static", "learn_scales": True}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only settings whose names hold all of these")
    parser.add_argument("--at-once", type=int, default=1, help="processes that share the GPU")
    parser.add_argument("--whole-loss", action="store_true", help="train.chunked_loss: false")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        from qft.machine.environment import prepare_libraries

        prepare_libraries()  # before the GPU is used for the first time: how its allocator works is settled then
        with tempfile.TemporaryDirectory() as folder:
            show(options.one, Path(folder), whole=options.whole_loss)
        return
    settings = [setting for setting in SETTINGS if all(word in setting for word in options.words)]
    with ThreadPoolExecutor(options.at_once) as pool:
        # In a process of its own, each finds nothing that another has left on the GPU.
        whole = ["--whole-loss"] if options.whole_loss else []
        commands = [[sys.executable, __file__, "--one", setting, *whole] for setting in settings]
        list(pool.map(lambda command: subprocess.run(command, check=False), commands))


def show(setting: str, folder: Path, *, whole: bool) -> None:
    try:
        line = measured(recipe(setting, folder, whole=whole))
    except Exception as error:
        line = {"failed": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()[-600:]}
    print(json.dumps({"setting": setting} | line), flush=True)


def model_folder(name: str, folder: Path) -> Path:
    """A random bfloat16 model with a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    path = folder / name
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    # One merge, of what no row holds: a GGUF file wants a byte-level BPE to have any.
    vocabulary["QQ"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Q", "Q")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON | MODELS[name]))
    torch.set_default_dtype(torch.float32)
    made.save_pretrained(path)
    return path


def recipe(setting: str, folder: Path, *, whole: bool) -> dict[str, Any]:
    """The recipe of a setting, and its rows."""
    name, mode, shape, *flags = setting.split("/")
    rows, tokens = (int(number) for number in shape.split("x"))
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz "
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows * 4):
            ragged = "ragged" in flags and number % rows
            length = tokens - (draw.randrange(tokens // 2) if ragged else 0)
            file.write(json.dumps({"text": "a" + "".join(draw.choices(letters, k=length - 2))}) + "\n")
    made: dict[str, Any] = {
        "model": {"path": str(model_folder(name, folder))},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": tokens},
        "train": {"max_steps": 4, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
                  "gradient_checkpointing": "kept" not in flags, "save_strategy": "no", "report_to": [],
                  "train_sampling_strategy": "sequential", "chunked_loss": False if whole else "auto"},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for section, values in MODES[mode].items():
        made.setdefault(section, {}).update(values)
    if mode == "nf4" and name.startswith("mixtral"):
        made["quant"]["allow_partial"] = True
    return made


def measured(values: dict[str, Any]) -> dict[str, Any]:
    """One training, and its largest figures once the optimizer has its state."""
    import torch

    from qft.commands.train import train
    from qft.plan import make_plan
    from qft.progress import Step, View
    from qft.recipe.load import from_values

    peaks: list[int] = []

    class Peaks(View):
        def step(self, step: Step) -> None:
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    loaded = from_values(values)
    started = time.perf_counter()
    predicted = make_plan(loaded).memory
    seconds = time.perf_counter() - started
    report = train(loaded, Peaks(), overwrite=True)
    free, total = torch.cuda.mem_get_info()
    gc.collect()
    left = torch.cuda.memory_allocated()
    most = max(peaks[1:])
    return {
        "measured": most,
        "predicted": predicted.predicted_peak_bytes,
        "error": predicted.predicted_peak_bytes and round(predicted.predicted_peak_bytes / most - 1, 4),
        "first": peaks[0],
        "left": left,
        "reserved": torch.cuda.max_memory_reserved(),
        "beside": total - free - torch.cuda.memory_reserved(),
        "host": [
            predicted.predicted_host_bytes,
            report.memory.peak_host_bytes,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        ],
        "predicting_seconds": round(seconds, 1),
        "components": predicted.components,
        "peaks": predicted.peaks,
    }


if __name__ == "__main__":
    main()
