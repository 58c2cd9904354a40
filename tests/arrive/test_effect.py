"""What a translated recipe does, against what the other tool's documentation says it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qft.arrive import translate
from qft.arrive.written import write_translated
from qft.machine.device import Device
from qft.recipe import LoadedRecipe, load
from tests.support.models import byte_tokenizer

ROW = {"instruction": "Say it.", "input": "", "output": "It."}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
MODULES = ["q_proj", "v_proj"]
AXOLOTL = {
    "base_model": "a/b", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 32,
    "lora_dropout": 0.05, "lora_target_modules": MODULES, "peft_use_rslora": True, "sequence_len": 512,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "learning_rate": 1e-4, "output_dir": "out",
    "micro_batch_size": 2, "optimizer": "paged_adamw_8bit", "warmup_steps": 7, "adam_beta2": 0.95,
}  # fmt: skip
LLAMA = {
    "model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "lora", "template": "default", "do_train": True,
    "dataset": "mine", "quantization_bit": 4, "lora_rank": 8, "lora_target": "q_proj,v_proj", "output_dir": "out",
    "optim": "paged_adamw_8bit", "warmup_steps": 7, "adam_beta2": 0.95, "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine", "learning_rate": 1e-4, "lora_dropout": 0.05, "use_rslora": True, "lora_alpha": 32,
}  # fmt: skip
TRL = {
    "model_name_or_path": "a/b", "dataset_name": "rows.jsonl", "use_peft": True, "lora_r": 8, "output_dir": "out",
    "lora_target_modules": MODULES, "load_in_4bit": True, "use_bnb_nested_quant": True, "optim": "paged_adamw_8bit",
    "warmup_steps": 7, "adam_beta2": 0.95, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine",
    "learning_rate": 1e-4, "use_rslora": True, "dtype": "bfloat16",
}  # fmt: skip
ALL = {"axolotl": AXOLOTL, "llama": LLAMA, "trl": TRL}


def loaded(folder: Path, values: dict[str, Any]) -> LoadedRecipe:
    """The recipe that is made of a configuration, with its rows beside it."""
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.jsonl"}}')
    for name in ("rows.jsonl", "data/mine.jsonl"):
        (folder / name).write_text(json.dumps(ROW) + "\n")
    (folder / "other.yaml").write_text(yaml.safe_dump(values))
    write_translated(folder / "recipe.yaml", translate(folder / "other.yaml"))
    return load(folder / "recipe.yaml")


@pytest.mark.parametrize("tool", ALL)
def test_peft_bitsandbytes_and_the_trainer_are_told_the_same(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources: axolotl/loaders/{adapter,model}.py (LoraConfig and BitsAndBytesConfig of a qlora); the arguments of
    llamafactory.hparams and `model_utils/quantization.py`; trl.ModelConfig and get_quantization_config."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from qft.plan.arguments import lora_arguments, training_arguments
    from qft.quant.hold.bnb_4bit import Bnb4Bit

    monkeypatch.chdir(tmp_path)
    recipe = loaded(tmp_path, ALL[tool]).recipe
    lora = LoraConfig(**lora_arguments(recipe))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 32, 0.05)
    assert (sorted(lora.target_modules or ()), lora.use_rslora, lora.bias) == (MODULES, True, "none")
    assert lora.modules_to_save is None
    held = BitsAndBytesConfig(**Bnb4Bit.of(recipe.quant, "bfloat16", ()).config())
    assert (held.bnb_4bit_quant_type, held.bnb_4bit_use_double_quant) == ("nf4", True)
    assert str(held.bnb_4bit_compute_dtype) == "torch.bfloat16"
    told = training_arguments(recipe, Device("cpu", "cpu", 0, bf16=True, tf32=False))
    assert (told["learning_rate"], told["lr_scheduler_type"], told["warmup_steps"]) == (1e-4, "cosine", 7)
    assert (told["optim"], told["adam_beta2"], told["per_device_train_batch_size"]) == ("paged_adamw_8bit", 0.95, 2)
    assert (told["seed"], told["weight_decay"], told["max_grad_norm"]) == (42, 0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "prompt", "answer"),
    [
        # axolotl/prompters.py, AlpacaPrompter: the prompt is masked, the answer and the end token are learnt.
        (AXOLOTL, f"<|bos|>{PREAMBLE}\n\n### Instruction:\nSay it.\n\n### Response:\n", "It.<|im_end|>"),
        (
            {**AXOLOTL, "datasets": [{"path": "rows.jsonl", "type": "alpaca:chat"}]},
            f"<|bos|>SYSTEM: {PREAMBLE}\nUSER: Say it.\nASSISTANT:",
            "It.<|im_end|>",
        ),
        (
            {**AXOLOTL, "datasets": [{"path": "rows.jsonl", "type": "alpaca:chatml"}]},
            f"<|im_start|>system\n{PREAMBLE}<|im_end|>\n<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n",
            "It.<|im_end|>",
        ),
        # axolotl/prompt_strategies/user_defined.py: a prompt of the configuration's own.
        (
            {
                **AXOLOTL,
                "datasets": [
                    {
                        "path": "rows.jsonl",
                        "type": {
                            "system_prompt": 'Be {{ "brief" }}.',
                            "system_format": "<{system}>\n",
                            "no_input_format": "[INST] {instruction} [/INST] ",
                        },
                    }
                ],
            },
            '<|bos|><Be {{ "brief" }}.>\n[INST] Say it. [/INST] ',
            "It.<|im_end|>",
        ),
        # llamafactory/data/template.py, register_template of `default`, `alpaca` and `chatml`.
        (LLAMA, "<|bos|>Human: Say it.<|im_end|>\nAssistant:", "It.<|im_end|>"),
        (
            {**LLAMA, "template": "alpaca"},
            f"<|bos|>{PREAMBLE}\n\n### Instruction:\nSay it.\n\n### Response:\n",
            "It.<|im_end|>",
        ),
        (
            {**LLAMA, "template": "chatml"},
            "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n",
            "It.<|im_end|>",
        ),
    ],
    ids=["alpaca", "alpaca:chat", "alpaca:chatml", "its own", "default", "llama alpaca", "chatml"],
)
def test_the_prompt_and_what_is_learnt_of_it(
    values: dict[str, Any], prompt: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qft.data.prepare import prepare
    from qft.data.template import IGNORED

    monkeypatch.chdir(tmp_path)
    recipe = loaded(tmp_path, values).recipe
    assert recipe.data.chat_template
    tokenizer = byte_tokenizer(Path(recipe.data.chat_template).read_text("utf-8"))
    row = prepare(recipe.data, tokenizer, recipe.seed).train[0]
    learnt = [label != IGNORED for label in row["labels"]]
    start = learnt.index(True)
    assert tokenizer.decode(row["input_ids"][:start]) == prompt
    assert tokenizer.decode([i for i, is_learnt in zip(row["input_ids"], learnt, strict=True) if is_learnt]) == answer
