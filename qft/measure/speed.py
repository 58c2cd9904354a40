"""How fast a model reads a prompt and writes an answer, in tokens per second."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from qft.data.batch import model_inputs
from qft.memory.meter import wait_for_device


def prefill_speed(model: Any, prompt: Sequence[int], *, repeats: int = 3) -> float:
    """Tokens per second of reading `prompt`, the best of `repeats` after one more to warm up."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    seconds = (_seconds(model, input_ids=ids, use_cache=True, logits_to_keep=1) for _ in range(repeats + 1))
    return len(prompt) / min(seconds)


def decode_speed(model: Any, prompt: Sequence[int], *, tokens: int = 32) -> float:
    """Tokens per second of writing `tokens` tokens after `prompt`, one row, reading the prompt left out."""
    inputs = model_inputs([prompt], 0, device=next(model.parameters()).device)

    def write(count: int) -> float:
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return _seconds(model.generate, **inputs, generation_config=settings)

    # The first of each also chooses kernels and takes memory; the better of two has not.
    long, short = (min(write(count) for _ in range(2)) for count in (tokens + 1, 1))
    return tokens / max(long - short, 1e-9)


def _seconds(work: Any, **inputs: Any) -> float:
    wait_for_device()
    started = time.perf_counter()
    with torch.inference_mode():
        work(**inputs)
    wait_for_device()
    return time.perf_counter() - started
