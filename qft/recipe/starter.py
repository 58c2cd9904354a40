"""A commented recipe to start from."""

import json
import os
from pathlib import Path

from qft.errors import MissingError, RecipeError
from qft.files import write_text
from qft.recipe.load import json_schema

STARTER = """\
# yaml-language-server: $schema={schema}
# Finetunes {model} on {data} in 4 bits.
#
#     qft check {recipe}      what will happen, and whether it can
#     qft train {recipe}

model:
  path: {model}            # a hub id, a folder, a .gguf file, or package:NAME/FILE

quant:
  preset: finetune         # 4-bit nf4 with double quantization; `mode: 8bit` or `mode: none` instead of the preset

adapter:
  r: 16                    # rank: more learns more, and takes more memory
  lora_alpha: 16           # the update is scaled by lora_alpha / r
  target_modules: all-linear

data:
  train: {data}
  eval_fraction: 0.05      # rows held out, to see whether it generalises
  max_length: auto         # longest row, in tokens: 2048, or what the model was built for where that is less

train:
  num_train_epochs: 1
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  learning_rate: 2e-4
  gradient_checkpointing: true   # less memory, some 30% slower

output_dir: {output}
"""

SCHEMA_FILE = "recipe.schema.json"


def write_starter(path: Path, model: str, data: Path) -> None:
    """Write a recipe for `model` and `data` to `path`, with its JSON Schema beside it for editors.

    Raises RecipeError if `path` exists, MissingError if `data` does not.
    """
    if path.exists():
        raise RecipeError(f"{path}: exists already, and is not overwritten")
    if not data.is_file():
        raise MissingError(f"{data}: no such data file")

    def relative(target: Path) -> str:
        return json.dumps(os.path.relpath(target.resolve(), path.parent.resolve()), ensure_ascii=False)

    where = relative(Path(model).expanduser()) if Path(model).expanduser().exists() else json.dumps(model)
    text = STARTER.format(
        schema=SCHEMA_FILE, model=where, data=relative(data), recipe=path, output=json.dumps(f"runs/{path.stem}")
    )
    write_text(path.parent / SCHEMA_FILE, json.dumps(json_schema(), indent=2) + "\n")
    write_text(path, text)
