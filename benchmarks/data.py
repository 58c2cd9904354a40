"""How long rows take to become tokens: read, rendered, encoded, masked and looked at; again from the cache; and one row
of tens of megabytes.

    python benchmarks/data.py [--rows 100000] [--num-proc auto]

Chats of English words with a BPE vocabulary of 8,000 that is trained on benchmarks/english.txt, and ChatML.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qft.data.audit import audit
from qft.data.prepare import Prepared, prepare
from qft.recipe.data import AuditSection, DataSection
from tests.support.models import CHATML

ENGLISH = Path(__file__).parent / "english.txt"


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train([str(ENGLISH)], trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def chat(draw: random.Random, words: list[str], least: int, most: int) -> list[dict[str, str]]:
    sizes = draw.randint(5, 25), draw.randint(least, most)
    texts = [" ".join(draw.choices(words, k=size)) for size in sizes]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    return sum(os.times()[:4])


def timed(name: str, path: Path, **data: Any) -> None:
    asked = DataSection.model_validate({"train": str(path), "max_length": 2048, **data})
    started, made = time.perf_counter(), tokenizer()
    trained, before = time.perf_counter() - started, cpu_seconds()
    rows: Prepared = prepare(asked, made, 0)
    encoded = time.perf_counter() - started - trained
    findings = audit(rows, AuditSection())
    seconds = time.perf_counter() - started - trained
    peak, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, cpu_seconds() - before
    found = ", ".join(f"{each.name} {each.rows}" for each in findings) or "none"
    print(
        f"{name:>28}: {seconds:6.2f} s ({encoded:.2f} s of it to read and encode; {used:.1f} s of processors), "
        f"{len(rows.train):,} rows, "
        f"{rows.sources[0].tokens:,} tokens; at most {peak:.2f} GiB; findings: {found}",
        flush=True,
    )


def beside(path: Path, folder: str) -> None:
    """What TRL's SFTTrainer makes of the same rows by two processes, with their answers alone learnt; no audit."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        print(f"{'TRL':>28}: is not installed", flush=True)
        return
    made = tokenizer()
    made.chat_template = CHATML.replace(
        "{{ m['content'] }}<|im_end|>", "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    )
    settings = SFTConfig(
        folder, max_length=2048, assistant_only_loss=True, dataset_num_proc=2, report_to=[], bf16=False
    )
    bare = SFTTrainer.__new__(SFTTrainer)  # its preparation reads these alone, and no model
    known = {"_is_vlm": False, "_is_vision_dataset": False, "completion_only_loss": False, "assistant_only_loss": True}
    vars(bare).update(known, processing_class=made, padding_free=False, chat_template=None, _tokenizer=made)
    started, before = time.perf_counter(), cpu_seconds()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
    rows = bare._prepare_dataset(rows, made, settings, False, None, "train")
    seconds = time.perf_counter() - started
    print(
        f"{'TRL':>28}: {seconds:6.2f} s ({cpu_seconds() - before:.1f} s of processors), {len(rows):,} rows", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--num-proc", default="auto")
    asked = parser.parse_args()
    processes = asked.num_proc if asked.num_proc == "auto" else int(asked.num_proc)
    draw, words = random.Random(0), ENGLISH.read_text().split()
    print(f"{os.cpu_count()} cores, of which {os.getloadavg()[0]:.1f} were busy for a minute", flush=True)
    with tempfile.TemporaryDirectory() as made:
        os.environ["QFT_CACHE"] = f"{made}/cache"
        short, long = Path(made, "short.jsonl"), Path(made, "long.jsonl")
        with short.open("w") as stream:
            for _ in range(asked.rows):
                stream.write(json.dumps({"messages": chat(draw, words, 5, 60)}) + "\n")
        with long.open("w") as stream:
            turns = [turn for _ in range(50_000) for turn in chat(draw, words, 80, 120)]
            stream.write(json.dumps({"messages": turns}) + "\n")
        timed("short chats", short, num_proc=processes)
        timed("the same again", short, num_proc=processes)
        beside(short, f"{made}/beside")
        timed(f"a row of {long.stat().st_size / 1e6:.0f} MB, cut", long, on_too_long="truncate")


if __name__ == "__main__":
    main()
