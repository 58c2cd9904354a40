"""What transformers makes of a GGUF file beside its weights: each is read once, and then kept."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qft.checkpoint.cache import companions, kept
from qft.checkpoint.gguf_says import complete, readable
from qft.checkpoint.quick_gguf import quick_gguf
from qft.files import write_json


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration. Raises what transformers does, and ModelError for a file that says what it cannot."""

    def read() -> PretrainedConfig:
        with quick_gguf(), readable(path):
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
            complete(config, path)
        # transformers notes the packing of the file; the weights are dequantized when they are loaded.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def restore(folder: Path) -> PretrainedConfig:
        config = AutoConfig.from_pretrained(str(folder))
        config.name_or_path = str(path.parent)
        return config

    return kept(path, "completed config", read, lambda config, folder: config.save_pretrained(folder), restore)


def gguf_tokenizer(path: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises what transformers does. It is kept as its class, arguments and tokenizer.json: from what
    save_pretrained writes, some classes make another."""

    def restore(folder: Path) -> PreTrainedTokenizerBase:
        made = json.loads((folder / "arguments.json").read_bytes())
        arguments = made["arguments"] | {"name_or_path": str(path.parent)}
        return getattr(transformers, made["class"])(tokenizer_file=str(folder / "tokenizer.json"), **arguments)

    def read() -> PreTrainedTokenizerBase:
        with quick_gguf():
            return _tokenizer_class(path, config).from_pretrained(str(path.parent), gguf_file=path.name)

    return kept(path, "tokenizer", read, _write_tokenizer, restore)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "arguments.json", {"class": type(tokenizer).__name__, "arguments": tokenizer.init_kwargs})


def _tokenizer_class(path: Path, config: PretrainedConfig) -> Any:
    """What AutoTokenizer would choose, which reads the file once more for its configuration."""
    chosen = transformers.TOKENIZER_MAPPING.get(type(config), transformers.PreTrainedTokenizerFast)
    return AutoTokenizer if companions(path) or chosen.__name__ == "MistralCommonBackend" else chosen
