"""What of a model and its tokenizer must be in an artifact as it was in the model as trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["QUESTION", "Facts", "facts_of", "rendered"]

Facts = dict[str, Any]
"""By the names of the gate's checks."""

QUESTION = [{"role": "user", "content": "How many legs has a spider?"}]


def facts_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> Facts:
    """`texts` are those whose tokens must be the same."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside, outside = base.get_input_embeddings(), base.get_output_embeddings()
    trained_head = isinstance(outside, BaseTunerLayer)
    stops = base.generation_config.eos_token_id
    bos = tokenizer.bos_token_id
    return {
        "tied_embeddings": not trained_head and getattr(outside, "weight", 0) is getattr(inside, "weight", None),
        "embedding_rows": inside.weight.shape[0],
        "vocabulary_size": len(tokenizer),
        "added_tokens": dict(sorted(tokenizer.get_added_vocab().items())),
        "token_ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "bos_count": tokenizer(QUESTION[0]["content"]).input_ids.count(bos) if bos is not None else 0,
        "chat_template": rendered(tokenizer, tokenizer.chat_template),
        "eos_token_id": sorted(stops) if isinstance(stops, list) else [stops],
    }


def rendered(tokenizer: Any, template: str | None) -> str:
    """A prompt as the chat template renders it, with the tokenizer's names for special tokens."""
    if template is None:
        return "none"
    text: str = tokenizer.apply_chat_template(
        QUESTION, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text
