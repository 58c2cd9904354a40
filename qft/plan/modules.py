"""Names, patterns and indices of modules in a recipe, held against the model's skeleton: each must match something.

What an entry matches is asked of the library that reads it: peft takes the entries of a list as names or the ends of
names, modules_to_save as any end, and a text as a regular expression of the whole name; transformers has its own way
with quant.skip_modules; calibrate.skip_modules is qft's own, and read as peft reads a list.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.checkpoint.language import beside_language
from qft.plan.targets import exclusion, unfit_linears
from qft.recipe import Recipe
from qft.recipe.section import Problem
from qft.recipe.training import AdapterSection

Matches = dict[str, dict[str, int]]
"""How many modules each entry of a field matches: {field: {entry: modules}}."""
Find = Callable[[str], list[str]]
"""Full names of the modules that an entry matches."""
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
"""What peft puts LoRA on."""
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""What peft cannot save whole."""
NARROWING = ("exclude_modules", "modules_to_save", "layers_to_transform")
"""Fields of `adapter` that leave out some of its targets."""
BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The first number in a module's name, which is its block's, as peft reads it."""
ALTERNATIVES = re.compile(r"\((?:\?:|(?!\?))((?:[^()\[\]\\]|\\.)*\|(?:[^()\[\]\\]|\\.)*)\)")
"""A group of a pattern that holds alternatives and no other group."""
NAMED = "list in target_modules what is to be adapted"
TOWERS = "set adapter.target_towers to true if it is meant"
SHOWN = 3
"""Names that a message offers."""


def match_skips(recipe: Recipe, model: nn.Module) -> tuple[Matches, list[Problem]]:
    """What quant.skip_modules leaves unquantized."""
    return _matched("quant.skip_modules", recipe.quant.named_skips, partial(_skipped, _owners(model)), model)


def match_own(field: str, ends: Sequence[str], model: nn.Module) -> tuple[Matches, list[Problem]]:
    """What the names, or the ends of names, in a field that qft alone reads match."""
    return _matched(field, ends, partial(_ending, _owners(model)), model)


def match_adapter(adapter: AdapterSection, model: PreTrainedModel) -> tuple[Matches, list[Problem]]:
    """What the fields of a LoRA adapter match; of its targets, what the other fields leave. `all-linear` is not among
    them: what that is to a model is known once peft has attached it."""
    matches: Matches = {}
    problems: list[Problem] = []
    for field, entries, find in _adapter_fields(adapter, model):
        counts, found = _matched(field, entries, find, model)
        matches |= counts
        problems += found
        if isinstance(getattr(adapter, field.partition(".")[2]), str) and not found:
            idle = _idle_branches(entries[0], find)
            problems += [(field, f"{each} in {entries[0]} adds nothing: {_near(each, model)}") for each in idle]
    if adapter.target_towers and not beside_language(model):
        problems.append(("adapter.target_towers", "the model is a language model alone; remove it"))
    if not problems:
        problems = [*_target_problems(adapter, model, matches), *_save_problems(adapter, model)]
    return matches, problems


def whole_problems(adapter: AdapterSection, quantized: Collection[str]) -> Iterator[Problem]:
    """What of modules_to_save is, or holds, one of the layers that are `quantized` and so cannot be trained whole."""
    for entry in adapter.modules_to_save:
        # It matches a layer or a module around it: the name up to a dot, or to the end, ends with the entry.
        if hits := [name for name in quantized if f"{entry}." in f"{name}."]:
            text = f"{min(hits)} is quantized, and cannot be trained whole; name it in quant.skip_modules too"
            yield "adapter.modules_to_save", f"{entry}: {text}"


def ends_with(name: str, end: str) -> bool:
    """Whether `end` is the name of a module or the last parts of it."""
    return f".{name}".endswith(f".{end}")


def _adapter_fields(adapter: AdapterSection, model: nn.Module) -> Iterator[tuple[str, Sequence[str], Find]]:
    owners, targets = _owners(model), adapter.target_modules
    if (excluded := adapter.exclude_modules) is not None:
        pattern = isinstance(excluded, str)
        find = partial(_full_matches if pattern else _ending, owners)
        yield "adapter.exclude_modules", (excluded,) if isinstance(excluded, str) else excluded, find
    yield "adapter.modules_to_save", adapter.modules_to_save, partial(_saved, model)
    if not is_all_linear(targets):
        entries = (targets,) if isinstance(targets, str) else targets
        yield "adapter.target_modules", entries, partial(_targets, adapter, model)


def is_all_linear(targets: str | Sequence[str]) -> bool:
    """Whether target_modules are peft's word for every linear layer."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _matched(field: str, entries: Sequence[str], find: Find, model: nn.Module) -> tuple[Matches, list[Problem]]:
    """What `find` finds for each entry, and what is wrong with those for which it finds nothing."""
    counts: dict[str, int] = {}
    problems: list[Problem] = []
    for entry in entries:
        try:
            counts[entry] = len(find(entry)) if entry else 0
        except re.error as error:
            problems.append((field, f"{entry} is no regular expression: {error}"))
            continue
        if not counts[entry]:
            problems.append((field, _matches_nothing(entry, model)))
    return ({field: counts} if counts else {}), problems


def _owners(model: nn.Module) -> list[str]:
    """Modules that hold parameters of their own, and not by modules within them."""
    return [name for name, module in _modules(model) if next(module.parameters(recurse=False), None) is not None]


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]


def _skipped(names: Sequence[str], entry: str) -> list[str]:
    return [name for name in names if not should_convert_module(name, [entry])]


def _ending(names: Sequence[str], entry: str) -> list[str]:
    return [name for name in names if ends_with(name, entry)]


def _full_matches(names: Sequence[str], entry: str) -> list[str]:
    return [name for name in names if re.fullmatch(entry, name)]


def _saved(model: nn.Module, entry: str) -> list[str]:
    re.compile(entry)  # peft also takes it for a pattern, of what adapters are not to be put on
    found = ((name, module) for name, module in _modules(model) if name.endswith(entry))
    return [name for name, module in found if next(module.parameters(), None) is not None]


def _targets(adapter: AdapterSection, model: nn.Module, entry: str, **narrowing: Any) -> list[str]:
    """What peft would adapt for one of target_modules."""
    config = LoraConfig(target_modules=entry if isinstance(adapter.target_modules, str) else [entry], **narrowing)
    try:
        return _adapted(config, model)
    except ValueError:  # transformers 5 has fused it with others of a mixture of experts, and it goes only with them
        try:
            return _adapted(LoraConfig(target_modules=list(adapter.target_modules), **narrowing), model)
        except ValueError:
            return [entry]  # peft says which others are missing as it attaches them


def _adapted(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules, and of the parameters of a mixture of experts, that peft would adapt. Raises ValueError for
    a part of what is fused."""
    convert_peft_config_for_transformers(config, model, None)
    modules = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    ends = config.target_parameters or ()
    return [*modules, *(name for name, _ in model.named_parameters() if any(ends_with(name, end) for end in ends))]


def _target_problems(adapter: AdapterSection, model: PreTrainedModel, matches: Matches) -> Iterator[Problem]:
    """Targets that peft cannot adapt, or that other fields leave nothing of; their counts become those of what is
    left."""
    field, modules, unfit = "adapter.target_modules", dict(model.named_modules()), unfit_linears(model)
    narrowing = {
        name: list(value) if isinstance(value, tuple) else value
        for name in NARROWING
        if (value := getattr(adapter, name))
    }
    kept = {"exclude_modules": excluded} if (excluded := exclusion(adapter, model)) else {}
    if not adapter.target_modules:
        yield field, "names no module; remove it for all linear layers"
    yield from _fused_problems(adapter, model)
    for entry in matches.get(field, {}):
        left = _targets(adapter, model, entry, **narrowing | kept)
        matches[field][entry] = len(left)
        strange = [n for n in left if n in unfit or (n in modules and not isinstance(modules[n], ADAPTABLE))]
        if strange:
            kind = type(modules[strange[0]]).__name__
            yield field, f"{entry} matches {strange[0]} ({kind}), and LoRA goes on linear layers and embeddings"
        elif not left and _targets(adapter, model, entry, **narrowing):
            yield field, f"{entry} matches nothing of the language part, and rows of text reach no other; {TOWERS}"
        elif not left:
            yield field, f"{entry}: {' and '.join(narrowing)} leave none of its modules"
    if adapter.layers_to_transform is not None and not isinstance(adapter.target_modules, str):
        yield from _block_problems(adapter, model, matches)


def _fused_problems(adapter: AdapterSection, model: nn.Module) -> Iterator[Problem]:
    """Fields that would narrow the parameters of a mixture of experts: peft reads them for modules alone. What
    all-linear is to a mixture is told peft module by module."""
    targets = adapter.target_modules
    if is_all_linear(targets):
        return
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        names = set(_adapted(config, model)) - dict(model.named_modules()).keys()
    except ValueError:
        return  # peft refuses these targets by itself
    if names and adapter.layers_to_transform is not None:
        yield "adapter.layers_to_transform", f"peft adapts {min(names)} and its like in every block; remove it"
    excluded = () if adapter.exclude_modules is None else adapter.exclude_modules
    for entry in (excluded,) if isinstance(excluded, str) else excluded:
        owners = sorted({name.rpartition(".")[0] for name in names})
        if kept := (_full_matches if isinstance(excluded, str) else _ending)(owners, entry):
            yield "adapter.exclude_modules", f"{entry}: peft adapts the parameters of {kept[0]} nevertheless; {NAMED}"


def _block_problems(adapter: AdapterSection, model: nn.Module, matches: Matches) -> Iterator[Problem]:
    """Counts the targets in each block of layers_to_transform."""
    field, indices = "adapter.layers_to_transform", adapter.layers_to_transform or ()
    targets = dict.fromkeys(name for entry in adapter.target_modules for name in _targets(adapter, model, entry))
    blocks = Counter(int(block[1]) for name in targets if (block := BLOCK.match(name)))
    matches[field] = {str(index): blocks[index] for index in indices}
    if not indices:
        yield field, "names no block; remove it for all of them"
    held = f"from {min(blocks)} to {max(blocks)}" if blocks else "of no number"
    for index, times in Counter(indices).items():
        if not blocks[index]:
            yield field, f"{index}: no block of that number holds target_modules; those that do are {held}"
        elif times > 1:
            yield field, f"{index} is there {times} times"


def _save_problems(adapter: AdapterSection, model: nn.Module) -> Iterator[Problem]:
    modules = dict(_modules(model))
    for entry in adapter.modules_to_save:
        if lists := [name for name in _saved(model, entry) if isinstance(modules[name], LISTS)]:
            yield "adapter.modules_to_save", f"{entry} matches {lists[0]}, a list of modules; name what is in it"


def _idle_branches(pattern: str, find: Find) -> Iterator[str]:
    """Yield the alternatives in a pattern, `(a|b)` or `a|b`, without which it would match the same."""
    groups = [(match.start(1), match.end(1)) for match in ALTERNATIVES.finditer(pattern)]
    for start, end in groups or ([(0, len(pattern))] if "(" not in pattern else []):
        for branch in re.split(r"(?<!\\)\|", pattern[start:end]):
            if not find(f"{pattern[:start]}{branch}{pattern[end:]}"):
                yield branch


def _matches_nothing(entry: str, model: nn.Module) -> str:
    """What is wrong with an entry, and which names are near it."""
    modules = dict(_modules(model))
    if not entry:
        return "an empty text names no module"
    if named := _ending(list(modules), entry):
        if next(modules[named[0]].parameters(recurse=False), None) is None:
            return f"{entry} matches no layer: {named[0]} holds no weights but those of the layers in it; name them"
        return f"{entry} matches nothing as a pattern of whole names: write [{entry}], or .*{entry}"
    return f"{entry} is no linear layer of the model, nor another module; {_near(entry, model)}"


def _near(entry: str, model: nn.Module) -> str:
    """Names that may have been meant, and those of the linear layers."""
    modules = dict(_modules(model))
    leaves = [name.rpartition(".")[2] for name in modules]
    known = dict.fromkeys(part for part in (*leaves, *modules) if not part.isdigit())
    near = difflib.get_close_matches(entry, known, n=SHOWN, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}; " if near else ""
    kinds = nn.Linear | Conv1D
    linears = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, kinds)})
    return f"{hint}the linear layers are called {', '.join(linears)}"
