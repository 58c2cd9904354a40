"""Whether the files of a checkpoint hold the weights of its model: every one, in its shape, and no others.

Told from headers alone, so before anything is loaded; and once more by what transformers says that it did.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from qft.checkpoint.conversion import Conversion
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.stored import Stored, some
from qft.errors import ModelError
from qft.recipe import Recipe

IGNORE = "if it is meant, name it in model.ignore_unexpected"


def require_weights(checkpoint: Checkpoint, model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Raise ModelError unless the files hold the weights of `model`, which is without contents, or what the recipe says
    of the others. MissingError for a file that is not there.

    Returns patterns of model.ignore_unexpected that fit nothing. Weights of a hub model that are still to come, those
    of a GGUF file and those that come quantized are looked at when they are loaded."""
    if checkpoint.gguf_file or not checkpoint.has_weights:
        return []
    stored = checkpoint.tensors()
    if checkpoint.quantization:
        return []
    conversion = Conversion(model, {name: tensor.empty() for name, tensor in stored.items()})
    left, idle = _unignored(conversion.unexpected, recipe.model.ignore_unexpected)
    _refuse(checkpoint, model, _problems(conversion, stored, left, recipe))
    return idle


def require_loaded(checkpoint: Checkpoint, model: Any, info: Mapping[str, Any], recipe: Recipe | None = None) -> None:
    """Raise ModelError unless transformers found a value for every weight of the loaded `model`, or the recipe says
    what of the others; `info` is its output_loading_info."""
    wrong = {name: (list(has), list(wanted)) for name, has, wanted in info["mismatched_keys"]}
    missing = _without_remade(sorted(info["missing_keys"]), recipe)
    # What a plain folder holds beside them was told from its headers.
    found = {name: name for name in sorted(info["unexpected_keys"]) if checkpoint.quantization}
    left, _ = _unignored(found, recipe.model.ignore_unexpected if recipe else ())
    texts = [*_missing(missing), *(f"{name} is {has} and should be {wanted}" for name, (has, wanted) in wrong.items())]
    _refuse(checkpoint, model, [*texts, *([f"unexpected: {some(left)} ({IGNORE})"] if left else [])])


def _refuse(checkpoint: Checkpoint, model: Any, problems: Iterable[str]) -> None:
    if texts := list(problems):
        whose = f"its weights are not those of the {type(model).__name__} that its configuration describes"
        raise ModelError(f"{checkpoint.path}: {whose}: {'; '.join(texts)}")


def _problems(made: Conversion, stored: Mapping[str, Stored], unexpected: list[str], recipe: Recipe) -> Iterator[str]:
    yield from _missing(_without_remade(made.missing, recipe))

    def origin(name: str) -> str:
        parts = [part for _, part in made.source[name].parts]
        return f"{some([f'{part} in {stored[part].path.name}' for part in parts])}"

    for name, reason in list(made.failed.items())[:3]:
        yield f"{name} cannot be made of what is there: {reason}"
    for name in made.doubled[:3]:
        yield f"{name} is there under two names ({origin(name)} is one)"
    for name, (has, wanted) in list(made.misshapen.items())[:3]:
        yield f"{name} is {has} and should be {wanted} ({origin(name)})"
    if len(made.misshapen) > 3:
        yield f"{len(made.misshapen)} are misshapen in all"
    if mistyped := made.mistyped:
        name = mistyped[0]
        kind = stored[made.source[name].parts[0][1]].kind
        yield f"{some(mistyped)} cannot be {kind} in a model that is not quantized ({origin(name)})"
    if unexpected:
        where = [f"{name} in {stored[name].path.name}" for name in unexpected]
        yield f"{len(unexpected)} unexpected: {some(where)} ({IGNORE})"


def _missing(names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} missing: {some(names)}"


def _without_remade(missing: Iterable[str], recipe: Recipe | None) -> list[str]:
    """Those that no adapter of the recipe replaces."""
    remade = recipe.adapter.modules_to_save if recipe and recipe.adapter.kind == "lora" else ()
    return [name for name in missing if not any(f".{module}." in f".{name}" for module in remade)]


def _unignored(unexpected: Mapping[str, str], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names in the files that no pattern fits, and patterns that fit none, nor what the model would call them."""
    fits = {pattern: {n for n, t in unexpected.items() if re.search(pattern, n) or re.search(pattern, t)}
            for pattern in patterns}  # fmt: skip
    ignored = set().union(*fits.values())
    return [name for name in unexpected if name not in ignored], [p for p, names in fits.items() if not names]
