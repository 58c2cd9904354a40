"""Whether the files of a checkpoint hold the weights of its model: every one, in its shape, and no others.

Told from headers alone, so before anything is loaded; and once more by what transformers says that it did.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from qft.checkpoint.conversion import FLOATS, Conversion
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.gguf_says import unread_tensors
from qft.checkpoint.stored import Stored, some
from qft.errors import ModelError
from qft.recipe import Recipe

IGNORE = "if it is meant, name it in model.ignore_unexpected"


def require_weights(checkpoint: Checkpoint, model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Raise ModelError unless the files hold the weights of `model`, which is without contents, or what the recipe says
    of the others. MissingError for a file that is not there.

    Returns patterns of model.ignore_unexpected that fit nothing. Weights of a hub model that are still to come and
    those that are held in few bits are looked at when they are loaded."""
    if not checkpoint.has_weights:
        return []
    if checkpoint.gguf_file:
        unread, missing = unread_tensors(checkpoint.folder / checkpoint.gguf_file, model)
        left, idle = _unignored({name: name for name in unread}, recipe.model.ignore_unexpected)
        unexpected = [f"unexpected: {some(left)} ({IGNORE})"] if left else []
        _refuse(checkpoint, model, [*_missing(_without_remade(missing, recipe)), *unexpected])
        return idle
    stored = checkpoint.tensors()
    conversion = Conversion(model, {name: tensor.empty() for name, tensor in stored.items()})
    if checkpoint.quantization and not checkpoint.packed:
        _refuse(
            checkpoint,
            model,
            _plain_problems(conversion, recipe, in_int8=bool(checkpoint.quantization.get("load_in_8bit"))),
        )
        return []
    left, idle = _unignored(conversion.unexpected, recipe.model.ignore_unexpected)
    _refuse(checkpoint, model, _problems(conversion, stored, left, recipe))
    return idle


def require_loaded(checkpoint: Checkpoint, model: Any, info: Mapping[str, Any], recipe: Recipe | None = None) -> None:
    """Raise ModelError unless transformers found a value for every weight of the loaded `model`, or the recipe says
    what of the others; `info` is its output_loading_info."""
    wrong = [f"{name} is {list(has)} and should be {list(wanted)}" for name, has, wanted in info["mismatched_keys"]]
    missing = _without_remade(sorted(info["missing_keys"]), recipe)
    # What a plain folder holds beside them was told from its headers.
    found = {name: name for name in sorted(info["unexpected_keys"]) if checkpoint.quantization}
    left, _ = _unignored(found, recipe.model.ignore_unexpected if recipe else ())
    texts = [*_missing(missing), *([some(sorted(wrong))] if wrong else [])]
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


def _plain_problems(made: Conversion, recipe: Recipe, *, in_int8: bool) -> Iterator[str]:
    """Of a checkpoint that comes quantized, what is wrong with the weights that are not: of modules that the files have
    nothing else of. The others are the quantizer's."""
    modules = {name for name, _ in made.model.named_modules()}
    held = {_module(name, modules) for name in made.unexpected.values()}

    def plain(names: Iterable[str]) -> list[str]:
        return [name for name in names if _module(name, modules) not in held]

    yield from _missing(_without_remade(plain(made.missing), recipe))
    if mistyped := plain(made.mistyped):
        yield f"{some(mistyped)} cannot be held in that dtype"
    floats = [name for name, value in made.made.items() if value.dtype in FLOATS and name.endswith(".weight")]
    if in_int8 and (unrounded := [name for name in floats if _module(name, modules) in held]):
        yield f"{some(unrounded)} should be I8, as it has scales"
    if misshapen := plain(made.misshapen):
        has, wanted = made.misshapen[misshapen[0]]
        yield f"{some(misshapen)} is {has} and should be {wanted}"


def _module(name: str, modules: Container[str]) -> str:
    """The innermost module that a tensor of that name lies in; empty: in none."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def incomplete_layers(stored: Iterable[str]) -> dict[str, list[str]]:
    """What the files lack of a layer, and have of another that is called alike."""
    parts: dict[str, set[str]] = {}
    for name in stored:
        found = re.match(r"(.*\.\d+\.[^.]+\.[^.]+)\.(.+)", name)  # model.layers.3.mlp.up_proj, weight.absmax
        if found:
            parts.setdefault(found[1], set()).add(found[2])
    whole: dict[str, set[str]] = {}
    for layer, own in parts.items():
        whole.setdefault(re.sub(r"\d+", "*", layer), set()).update(own)
    lacking = {layer: sorted(whole[re.sub(r"\d+", "*", layer)] - own) for layer, own in parts.items()}
    return {layer: names for layer, names in lacking.items() if names}


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
