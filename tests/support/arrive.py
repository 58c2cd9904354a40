"""Configurations of other tools, in their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qft.arrive import Kind, Translation, translate

AXOLOTL: dict[str, Any] = {
    "base_model": "acme/llama-1b",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_target_modules": ["q_proj"],
    "datasets": [{"path": "acme/rows", "type": "alpaca", "split": "train[:20%]"}],
    "val_set_size": 0.1,
    "evals_per_epoch": 1,
    "saves_per_epoch": 1,
    "sequence_len": 2048,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 3,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "attn_implementation": "flash_attention_2",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "wandb_project": None,
    "special_tokens": {"pad_token": "<pad>"},
    "output_dir": "outputs/one",
}
LLAMA: dict[str, Any] = {
    "model_name_or_path": "acme/llama-1b",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "q_proj, v_proj",
    "quantization_bit": 4,
    "double_quantization": False,
    "dataset": "mine",
    "template": "default",
    "cutoff_len": 512,
    "max_samples": 2,
    "output_dir": "saves/one",
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 1.0e-4,
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
TRL: dict[str, Any] = {
    "model_name_or_path": "acme/llama-1b",
    "dataset_name": "acme/rows",
    "dataset_train_split": "train_sft",
    "use_peft": True,
    "lora_r": 8,
    "load_in_4bit": True,
    "output_dir": "out",
}
TUNE: dict[str, Any] = {
    "output_dir": "/tmp/one",
    "model": {
        "_component_": "torchtune.models.llama3_1.qlora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 8,
        "lora_alpha": 16,
    },
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "/tmp/m/t", "max_seq_len": None},
    "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "/tmp/m/",
                     "output_dir": "${output_dir}"},
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False},
    "seed": None,
    "batch_size": 2,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": 3e-4},
    "lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                     "num_warmup_steps": 100},
    "epochs": 1,
    "dtype": "bf16",
    "device": "cuda",
}  # fmt: skip
ALL = {"Axolotl": AXOLOTL, "LLaMA-Factory": LLAMA, "TRL": TRL, "torchtune": TUNE}


def translated(folder: Path, values: dict[str, Any]) -> Translation:
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(values))
    return translate(path)


def kinds(made: Translation) -> dict[str, Kind]:
    return {line.key: line.kind for line in made.lines}
