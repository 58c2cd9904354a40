"""What Python holds at one moment, counted so that two moments tell what grew between them."""

import gc
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch

CONTAINERS = (list, dict, set, deque)
SAMPLE = 64
"""Elements of a container, or objects of a type, that are looked at to tell the bytes of one."""
MOST_NODES = 200_000
"""Of autograd graphs that are followed."""


@dataclass
class Census:
    """Counts of one moment; it keeps none of the objects alive."""

    step: int
    containers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Their id -> [length, id of the first element]: another that came to lie at the same place begins otherwise."""
    tensors: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many of each [kind in words, bytes of one]."""
    types: Counter[type] = field(default_factory=Counter)
    """Objects of each other class."""
    graph_tensors: int = 0
    """Tensors that hold a graph."""
    graph_nodes: int = 0
    """Of those graphs, each counted once."""


def take_census(step: int) -> Census:
    """A walk over all objects that Python's garbage collector knows: about a second."""
    gc.collect()
    objects = _objects()  # before the census, which is not to count itself
    census, graphs = Census(step, types=Counter(map(type, objects))), set()
    containers = {kind for kind in census.types if issubclass(kind, CONTAINERS)}
    tensors = {kind for kind in census.types if issubclass(kind, torch.Tensor)}
    for each in objects:
        if type(each) in containers:
            if length := len(values := _values(each)):
                census.containers[id(each)] = length, 0 if isinstance(each, set) else id(next(iter(values)))
        elif type(each) in tensors:
            census.tensors[_kind_of(each)] += 1
            if (graph := _graph(each)) is not None:
                graphs.add(graph)
                census.graph_tensors += 1
    for kind in containers | tensors:
        del census.types[kind]
    census.graph_nodes = _nodes(graphs)
    return census


def steady(looks: Sequence[Census], counts: Sequence[int]) -> float:
    """By how much a count grew in a step: the least between two looks, so that a jump is no growth."""
    between = zip(pairwise(looks), pairwise(counts), strict=True)
    return min((more - less) / (later.step - look.step) for (look, later), (less, more) in between)


def grown_containers(looks: Sequence[Census]) -> Iterator[tuple[Any, float, float]]:
    """Yield [container, elements that came in a step, their bytes] of those that grew by one a step or more."""
    last = looks[-1].containers
    same = [each for each, (_, first) in last.items() if all(_begins(look, each, first) for look in looks)]
    rates = {each: steady(looks, [look.containers[each][0] for look in looks]) for each in same}
    for each in _objects():
        if (rate := rates.get(id(each), 0)) >= 1 and issubclass(type(each), CONTAINERS):
            slot = sys.getsizeof(each, 0) / len(each)
            yield each, rate, rate * (_bytes_of_one(_newest(each)) + slot)


def grown_types(looks: Sequence[Census]) -> Iterator[tuple[type, float, float]]:
    """Yield [class, objects that came in a step, their bytes] of the classes that grew by one a step or more."""
    rates = {kind: steady(looks, [look.types[kind] for look in looks]) for kind in looks[-1].types}
    samples: dict[type, list[Any]] = {kind: [] for kind, rate in rates.items() if rate >= 1}
    for each in gc.get_objects():
        if (found := samples.get(type(each))) is not None and len(found) < SAMPLE:
            found.append(each)
    for kind, sample in samples.items():
        yield kind, rates[kind], rates[kind] * _bytes_of_one(sample)


def holder(container: Any) -> str:
    """Who holds a container, in words: `kept of Collator`, `CACHE of module x`; empty where that is not found."""
    for module, name, value in _globals():
        if value is container:
            return f"{name} of module {module}"
    for referrer in gc.get_referrers(container):
        names = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if value is container and isinstance(name, str):
                return f"{name} of {_owner(referrer, names)}"
    return ""


def _objects() -> list[Any]:
    objects = gc.get_objects()
    # What was there before gc.freeze() is not among them (to count it takes a walk through it): add what has a name.
    if not any(each is sys.modules for each in objects):
        objects += [value for _, _, value in _globals() if type(value) in CONTAINERS]
    return objects


def _globals() -> Iterator[tuple[str, str, Any]]:
    """Yield [module, name, value] of all modules' names."""
    for module, loaded in list(sys.modules.items()):
        for name, value in list(getattr(loaded, "__dict__", {}).items()):
            yield module, name, value


def _owner(referrer: Any, names: dict[Any, Any]) -> str:
    owners = [referrer] if referrer is not names else gc.get_referrers(names)
    for owner in owners:
        if getattr(owner, "__dict__", None) is names:
            return f"class {owner.__qualname__}" if isinstance(owner, type) else type(owner).__qualname__
    return "a dict"


def _begins(look: Census, container: int, first: int) -> bool:
    return container in look.containers and look.containers[container][1] == first


def _values(container: Any) -> Any:
    """What a container holds, not asking a class of its own: some import a library at the first question."""
    return dict.values(container) if isinstance(container, dict) else container


def _kind_of(tensor: torch.Tensor) -> tuple[str, int]:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}"
    return kind, size_of(tensor, set())


def _graph(tensor: torch.Tensor) -> Any:
    with suppress(RuntimeError):  # of a view whose base was changed in place
        return tensor.grad_fn
    return None


def _nodes(graphs: set[Any]) -> int:
    """Nodes of autograd graphs, each counted once."""
    seen, waiting = set(graphs), list(graphs)
    while waiting and len(seen) < MOST_NODES:
        following = {node for node, _ in waiting.pop().next_functions if node is not None} - seen
        seen |= following
        waiting.extend(following)
    return len(seen)


def _newest(container: Any) -> list[Any]:
    """Elements of a container, the newest if it has an order."""
    values = _values(container)
    return list(islice(values if isinstance(values, set) else reversed(values), SAMPLE))


def _bytes_of_one(sample: list[Any]) -> int:
    """The mean of their own bytes, without the one of most where there are several: what all share is counted there."""
    each = {id(one): one for one in sample}
    seen, sizes = set(each), []
    for key, one in each.items():
        seen.discard(key)
        sizes.append(size_of(one, seen))
    return sum(sorted(sizes)[:-1] or sizes) // max(len(sample) - 1, 1)


def size_of(value: Any, seen: set[int], depth: int = 3) -> int:
    """Bytes of a value and of what it holds, `depth` levels deep, without what is in `seen`, which they join."""
    kind = type(value)
    if issubclass(kind, torch.Tensor):
        return _once(*_storage(value), seen)
    if issubclass(kind, np.ndarray):
        return _once(id(value if value.base is None else value.base), value.nbytes, seen)
    if issubclass(kind, type | ModuleType) or not (own := _once(id(value), sys.getsizeof(value, 0), seen)) or not depth:
        return 0
    held = value if issubclass(kind, (*CONTAINERS, tuple)) else getattr(value, "__dict__", None)
    if not isinstance(held, (*CONTAINERS, tuple)):
        return own
    return own + sum(size_of(each, seen, depth - 1) for each in _newest(held))


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others, and its bytes."""
    try:
        storage = tensor.untyped_storage()
        return (storage.data_ptr(), storage.nbytes()) if tensor.device.type != "meta" else (0, 0)
    except (RuntimeError, NotImplementedError):  # of classes that wrap others
        return id(tensor), tensor.numel() * tensor.element_size()


def _once(key: int, count: int, seen: set[int]) -> int:
    if key in seen:
        return 0
    seen.add(key)
    return count
