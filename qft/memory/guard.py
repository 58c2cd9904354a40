"""An allocator's failure as one message that says what to change, of what the recipe has not done yet."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from qft.errors import OutOfMemoryError
from qft.quant.hold import Scheme
from qft.recipe import Recipe
from qft.recipe.schema import CalibrateSection


@contextmanager
def memory_guard(what: str, remedies: Iterable[str]) -> Iterator[None]:
    """Turn an allocator's failure into one message; `remedies` are what is left to do, the largest gain first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(_message(what, remedies, error)) from error


def smaller_base(recipe: Recipe, scheme: Scheme) -> Iterator[str]:
    """What lets a base, held by `scheme`, take less."""
    if recipe.adapter.kind == "none":
        yield "train adapters instead of all weights (adapter.kind: lora)"
    elif scheme.above_4_bits:
        yield "hold the base in 4 bits (quant.mode: 4bit)"
    elif scheme.quant_type and not recipe.quant.double_quant:
        yield "set quant.double_quant: true"


def smaller_training(recipe: Recipe, scheme: Scheme) -> Iterator[str]:
    """What lets a training take less. A base that was loaded has its place: it is the activations that grow."""
    train = recipe.train
    if recipe.adapter.kind == "none":
        yield from smaller_base(recipe, scheme)
        if train.optim.startswith(("adamw_torch", "paged_adamw_32bit")):
            yield "set train.optim: adamw_8bit"
    if not train.gradient_checkpointing:
        yield "set train.gradient_checkpointing: true"
    if train.per_device_train_batch_size > 1:
        yield (
            f"lower train.per_device_train_batch_size ({train.per_device_train_batch_size}) and raise "
            "train.gradient_accumulation_steps by as much"
        )
    if recipe.adapter.kind == "lora":
        yield from smaller_base(recipe, scheme)
        if recipe.memory.offload == "none":
            yield "have the base wait on the host (memory.offload: cpu)"
    yield "lower data.max_length"


def smaller_calibration(calibrate: CalibrateSection) -> Iterator[str]:
    """What lets a calibration take less."""
    if calibrate.samples > 1:
        yield f"lower calibrate.samples ({calibrate.samples})"
    yield f"lower calibrate.max_length ({calibrate.max_length})"


def _message(what: str, remedies: Iterable[str], error: BaseException) -> str:
    steps = "; ".join(remedies) or "take a smaller model, or a device with more memory"
    return f"out of memory while {what}: {_first_sentence(error)} What helps, the most first: {steps}"


def _first_sentence(error: BaseException) -> str:
    """The first that speaks of memory: some allocators begin with a line of their source."""
    sentences = re.split(r"(?<=\.)\s+", str(error) or "The host has no more.")
    return next((sentence for sentence in sentences if "memory" in sentence), sentences[0])
