"""What turns a conversation into the inputs of a model: its tokenizer, and beside it, for images, its processor."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

FILES = ("*processor_config.json", "chat_template.json")
"""Of a processor, in a model's folder; what it holds of a tokenizer is that of the tokenizer."""


def processor_files(folder: Path) -> list[Path]:
    """Those that a model's folder has."""
    return sorted(path for pattern in FILES for path in folder.glob(pattern) if path.is_file())


def save_reader(tokenizer: Any, base: Path, folder: Path) -> None:
    """Write the tokenizer into `folder`, and copy what the base's processor is described by."""
    tokenizer.save_pretrained(str(folder))
    for path in processor_files(base):
        shutil.copyfile(path, folder / path.name)


def processor_template(base: Path) -> str | None:
    """The chat template that a processor's files hold; None: they hold none."""
    for path in processor_files(base):
        with suppress(ValueError, OSError):
            content = json.loads(path.read_text("utf-8"))
            if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
                return str(content["chat_template"])
    return None
