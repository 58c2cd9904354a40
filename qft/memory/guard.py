"""An allocator's failure as one message that says what to change, of what the recipe has not done yet."""

import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from qft.errors import OutOfMemoryError, causes
from qft.quant.hold import Scheme
from qft.recipe import Recipe
from qft.recipe.memory import UNITS
from qft.recipe.schema import CalibrateSection

SAID = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""By what a RuntimeError of another kind tells that memory ran out: of the host, in a kernel, in cuBLAS."""


@contextmanager
def memory_guard(what: str, remedies: Iterable[str]) -> Iterator[None]:
    """Turn an allocator's failure into one message; `remedies` are what is left to do, the largest gain first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_message(what, remedies, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed, of the GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)


def asked_bytes(error: BaseException) -> int | None:
    """Bytes for which the allocator was asked, as its message says, to the digits that it gives; None: it says
    nothing."""
    found = re.search(r"\ballocate ([\d.]+) (bytes|[KMGT]iB)", str(error))
    return int(float(found[1]) * UNITS[found[2].replace("bytes", "B")]) if found else None


def let_go(error: BaseException) -> None:
    """Drop what the functions held that `error` ended, tensors among it."""
    for each in causes(error, in_context=True):
        traceback.clear_frames(each.__traceback__)


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
    if train.per_device_train_batch_size not in (1, "auto"):
        yield (
            f"lower train.per_device_train_batch_size ({train.per_device_train_batch_size}) and raise "
            "train.gradient_accumulation_steps by as much"
        )
    if recipe.adapter.kind == "lora":
        yield from smaller_base(recipe, scheme)
        if recipe.memory.offload == "none" and recipe.model.device != "cpu" and torch.cuda.is_available():
            yield "have the base wait on the host (memory.offload: cpu)"
    yield "lower data.max_length"


def smaller_evaluation(recipe: Recipe, scheme: Scheme, field: str, rows: int) -> Iterator[str]:
    """What lets held-out rows take less, of which `rows` are looked at at once, as `field` says."""
    if rows > 1:
        yield f"lower {field} ({rows})"
    if field == "eval.batch_size":
        yield f"lower eval.max_new_tokens ({recipe.eval.max_new_tokens})"
    yield from smaller_base(recipe, scheme)
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
